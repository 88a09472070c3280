"""How to train a model that will be quantized."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from compress.errors import BadInput
from compress.quant.qat.token_bits import TokenBits

Scale = Literal["lsq", "statsq"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]
_WARM = 0.05  # share of the steps over which the rates rise


@dataclass(frozen=True)
class QatSettings:
    """How to train; in `train_blockwise` each window has all the steps.

    ``batch``: sequences a step. ``learning_rate``: Adam's for weights, ``step_rate`` for the
    logarithms of the steps; both fall to 0 as a cosine. ``scale``: "lsq" learns the steps,
    "statsq" takes them from the weights. ``per_tensor``: one step a matrix, as EdgeQAT has it,
    stored as that of every row. ``scale_dtype``: in which steps are stored.

    The loss is the hidden error (`train_blockwise`) or, with ``soft`` the share of what the teacher
    says at ``temperature`` in it, the distillation loss (`train_full`), and ``attention`` times
    the distribution guide, ``entropy`` times the entropy guide and ``rate`` times the codes' bits
    per weight. ``paper_literal``: both guides as the paper prints them, which harms.

    In the last ``anneal`` of the steps only weights within ``anneal_range`` steps of where their
    code changes are trained. ``watch``: last steps over which changes of codes are counted.
    ``kv_bits``: of keys and values, None for floats. ``token_bits``: activations of two widths.
    ``every``: steps between two journals of `train_full`.

    Raises `BadInput` for values that make no training.
    """

    steps: int = 200
    batch: int = 4
    learning_rate: float = 1e-4
    step_rate: float = 1e-3
    scale: Scale = "lsq"
    per_tensor: bool = False
    scale_dtype: ScaleDtype = "bfloat16"
    attention: float = 1.0
    entropy: float = 0.1
    rate: float = 0.0
    soft: float = 0.5
    temperature: float = 2.0
    paper_literal: bool = False
    anneal: float = 0.1
    anneal_range: float = 0.005
    watch: int = 20
    kv_bits: int | None = None
    token_bits: TokenBits | None = None
    seed: int = 0
    every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "watch", "every"):
            if getattr(self, name) < 1:
                self._refuse(name, "1 or more")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                self._refuse(name, "a positive number")
        for name in ("step_rate", "attention", "entropy", "rate"):
            if not 0 <= getattr(self, name) < math.inf:
                self._refuse(name, "a number, 0 or more")
        for name in ("soft", "anneal"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "a share, 0 to 1")
        if not 0 < self.anneal_range <= 0.5:
            self._refuse("anneal_range", "more than 0 and at most half a step")
        if self.kv_bits is not None and not 2 <= self.kv_bits <= 8:
            self._refuse("kv_bits", "2 to 8")
        for name, known in (("scale", Scale), ("scale_dtype", ScaleDtype)):
            if getattr(self, name) not in get_args(known):
                self._refuse(name, f"one of {', '.join(get_args(known))}")

    @property
    def simulated(self) -> tuple[str, ...]:
        """The settings in use that no checkpoint can state: what trained with them is research."""
        return tuple(n for n in ("kv_bits", "token_bits") if getattr(self, n) is not None)

    @property
    def guided(self) -> bool:
        """Whether the loss looks into attention."""
        return self.attention > 0 or self.entropy > 0

    def pace(self, step: int) -> float:
        """By what the rates of a step are multiplied."""
        rise = min(1.0, (step + 1) / max(1.0, _WARM * self.steps))
        return rise * (1 + math.cos(math.pi * step / self.steps)) / 2

    def within(self, step: int) -> float | None:
        """The range of annealing in a step, None where all weights are trained."""
        return self.anneal_range if step >= self.steps - int(self.anneal * self.steps) else None

    def rows(self, step: int, count: int) -> list[int]:
        """Which of ``count`` sequences a step sees: all in turn, shuffled anew each time round.

        It depends on nothing before it, so that going on after an interruption takes no state.
        """
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self._shuffled(place // count, count)[place % count] for place in places]

    def _shuffled(self, turn: int, count: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self.seed}/{turn}").shuffle(order)
        return order

    def _refuse(self, name: str, expected: str) -> NoReturn:
        got = getattr(self, name)
        raise BadInput("makes no training", where=f"qat.{name}", got=got, expected=expected)
