"""Things that recipes can name."""

from __future__ import annotations

from typing import Generic, TypeVar

from compress.errors import BadInput, did_you_mean

Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """One object of each registered class, by the class's ``name``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, Thing] = {}

    def register(self, thing: type[Thing]) -> type[Thing]:
        """Class decorator: make a class known to recipes under its ``name``."""
        self._things[thing.name] = thing()  # type: ignore[attr-defined]
        return thing

    def get(self, name: str) -> Thing:
        """The object of that name; `BadInput` with the nearest name otherwise."""
        if name not in self._things:
            raise BadInput(f"unknown {self.kind} '{name}'", mend=did_you_mean(name, self._things))
        return self._things[name]

    def names(self) -> list[str]:
        return sorted(self._things)
