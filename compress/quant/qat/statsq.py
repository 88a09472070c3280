"""Steps that follow from the weights, so that they cannot make codes oscillate.

StatsQ of "Oscillation-free Quantization for Low-bit Vision Transformers" (OFQ), arXiv 2302.02210:
weights are clipped at ``2 * mean|w|`` of their row, and no gradient passes through that number. The
paper's levels lie half a step off 0, which neither int8 codes nor compressed-tensors' zero points
can say, so there is one level fewer here, and one of them is 0. Imports torch.
"""

from __future__ import annotations

import torch

from compress.quant.qat.fake_weight import FakeWeight


class StatsQ(FakeWeight):
    """With one step a row or group of columns, ``2 * mean|w| / limit`` of the weights as they are.

    Per tensor where ``per_tensor``. Raises as `FakeWeight`.
    """

    def __init__(self, *args: object, per_tensor: bool = False) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._per_tensor = per_tensor

    def exact_step(self) -> torch.Tensor:
        w = self.weight.detach().view((1, 1, -1) if self._per_tensor else self._shape)
        return 2 * w.abs().mean(2, keepdim=True) / self.limit
