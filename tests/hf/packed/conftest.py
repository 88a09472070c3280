"""Models packed in memory, and an emulator in the place of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from compress.codec.packed import cuda
from compress.hf.packed import experts, forms, merged, modules, ops
from tests.codec.packed.emulated import shared_emulator


def pack_all(model: Any, form: str = "stored", exact: str = "logits") -> Any:
    """``model`` with every weight packed that can be, tied ones once, even if they grow."""
    made: dict[int, Any] = {}

    def packed(weight: nn.Parameter) -> Any:
        if id(weight) not in made:
            made[id(weight)] = (weight, forms.pack(weight, form, smaller=False))
        return made[id(weight)][1]

    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            modules.adopt(module, *packed(module.weight), exact)
        elif names := experts.packable(module):
            experts.adopt(module, {name: packed(getattr(module, name)) for name in names})
    return model


@pytest.fixture(scope="session")
def pack_model() -> Callable[..., Any]:
    return pack_all


@pytest.fixture
def gpu(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Tensors of the CPU are taken for a GPU's; the names of the kernels that were launched."""
    emulator = shared_emulator(tmp_path_factory)
    launched: list[str] = []

    class Noting:
        def launch(self, name: str, *args: Any) -> None:
            launched.append(name)
            emulator.launch(name, *args)

        def prepare(self, name: str) -> None:
            launched.append(f"prepare {name}")

    for module in (forms, ops, modules, merged):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    with cuda.register_launcher("cpu", Noting()):
        yield launched


@pytest.fixture(params=forms.FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def weight() -> Callable[..., torch.Tensor]:
    """Random values as of a trained matrix."""

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 0.03).to(dtype)

    return make
