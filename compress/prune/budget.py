"""How much is to go: units until what they cost adds up to a target."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from compress.errors import BadInput
from compress.prune.fitness import Removal, Unit


@dataclass(frozen=True)
class Budget:
    """By unit that may go what its removal saves, and how much is to be saved at least.

    With a cost of one each, ``target`` is the number of units to remove.
    """

    costs: Mapping[Unit, int]
    target: int

    def __post_init__(self) -> None:
        """Raises `BadInput` where all units together do not save that much."""
        most = sum(self.costs.values())
        if not 0 < self.target <= most:
            raise BadInput(
                "so much cannot be removed: there are too few units that may go",
                got=self.target,
                expected=f"1 to {most}",
                mend="remove less, or protect fewer blocks",
            )

    @classmethod
    def of_units(cls, units: Collection[Unit], drop: int) -> Budget:
        """``drop`` of the ``units``, whatever they cost."""
        return cls(dict.fromkeys(units, 1), drop)

    @property
    def units(self) -> list[Unit]:
        """What may go, by name and index."""
        return sorted(self.costs)

    def spent(self, removal: Iterable[Unit]) -> int:
        """What the removal saves."""
        return sum(self.costs[unit] for unit in removal)

    def met(self, removal: Iterable[Unit]) -> bool:
        """Whether it saves enough."""
        return self.spent(removal) >= self.target

    def cut(self, order: Iterable[Unit]) -> Removal:
        """The first units of ``order`` that save enough, without those that turned out superfluous.

        A large unit may save what earlier ones do as well; of those the last ones stay.
        """
        chosen: list[Unit] = []
        for unit in order:
            if self.met(chosen):
                break
            chosen.append(unit)
        for unit in reversed(chosen):
            rest = [other for other in chosen if other != unit]
            if self.met(rest):
                chosen = rest
        return frozenset(chosen)
