from __future__ import annotations

import torch

from compress.quant.qat.annealing import OscillationMeter, near_boundary
from compress.quant.qat.lsq import Lsq
from compress.quant.qtensor import Scheme


def test_boundaries_lie_between_two_codes() -> None:
    ratio = torch.tensor([0.0, 0.49, 0.5, 0.52, -0.5, -1.495, 2.5, 3.5, -3.5, 3.0])
    expected = [False, True, True, False, True, True, True, False, False, False]
    assert near_boundary(ratio, 3, 0.01).tolist() == expected
    assert near_boundary(ratio, 3, 0.5).tolist() == [True] * 7 + [False] * 3


def test_only_weights_that_are_undecided_have_gradients_and_steps_none() -> None:
    w = torch.tensor([[0.502, 0.3, -1.499, 2.0]])
    fake = Lsq(w, Scheme(3, None, True), torch.float32, "w", start=torch.ones(1, 1))
    fake(0.005)[0].sum().backward()
    assert fake.weight.grad is not None
    assert fake.weight.grad.tolist() == [[1, 0, 1, 0]]
    assert fake.log_step.grad is not None
    assert float(fake.log_step.grad) == 0


def test_the_meter_counts_codes_that_change_more_than_once() -> None:
    meter = OscillationMeter(torch.tensor([[0, 0, 0, 5]], dtype=torch.int8))
    for codes in ([1, 1, 0, 5], [0, 1, 0, 5], [1, 1, 0, 4], [0, 1, 0, 5]):
        meter.update(torch.tensor([codes], dtype=torch.int8))
    assert meter.flips.tolist() == [[4, 1, 0, 2]]
    assert meter.share == 0.5
    meter.update(torch.tensor([[7, 7, 7, 7]], dtype=torch.int8), count=False)
    assert meter.share == 0.5
    meter.update(torch.tensor([[7, 7, 7, 7]], dtype=torch.int8))
    assert meter.flips.tolist() == [[4, 1, 0, 2]]
