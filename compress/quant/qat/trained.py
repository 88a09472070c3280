"""What training gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.quant.rate import Rate

if TYPE_CHECKING:
    from compress.quant.qtensor import QTensor


@dataclass(frozen=True)
class Trained:
    """Quantized weights, on the CPU, by the model's parameter name.

    ``history``: the loss of each step, of one window after the other; ``oscillation``: by weight,
    the share of codes that changed more than once in the last steps; ``rates``: what each weight
    costs; ``errors``: of each window, `hidden_error` of all sequences after it, the blocks before
    it being quantized too (`train_full` has none).
    """

    weights: Mapping[str, QTensor]
    history: tuple[float, ...]
    oscillation: Mapping[str, float]
    rates: Mapping[str, Rate]
    errors: tuple[float, ...] = ()
