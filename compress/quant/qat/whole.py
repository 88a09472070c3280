"""The whole model beside its quantized self, as one module that accelerate can place.

Imports torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from compress.quant.qat.distill_losses import distillation_loss
from compress.quant.qat.settings import QatSettings
from compress.quant.qat.simulation import Simulation
from compress.quant.qat.student import Student
from compress.quant.qtensor import QTensor, Scheme


class Whole(torch.nn.Module):
    """Its parameters are those that are trained; ``model`` is shared and not one of its modules."""

    def __init__(
        self,
        model: Any,
        targets: Mapping[str, Scheme],
        settings: QatSettings,
        activations: int | None,
        start: Mapping[str, QTensor],
    ) -> None:
        super().__init__()
        self._model, self._settings = [model], settings
        self.student = Student(model, targets, settings, start)
        self.simulation = Simulation(model, self.student.weights(), settings, activations)

    def forward(self, row: torch.Tensor | None) -> Any:
        """The loss for a sequence [length]; for None what came of the weights, on the CPU.

        Both in one place, as parameters are whole only in here where processes share them.
        """
        if row is None:
            weights = {
                name: QTensor(value.codes.cpu(), value.scale.cpu(), None, value.scheme)
                for name, value in self.student.qtensors().items()
            }
            return weights, self.student.oscillation()
        with torch.no_grad():
            reference = _logits(self._model[0], row)
        teacher = self.simulation.clear()
        with self.simulation.quantized():
            own = _logits(self._model[0], row)
        loss = distillation_loss(
            own,
            reference,
            row,
            soft=self._settings.soft,
            temperature=self._settings.temperature,
        )
        return loss + self.student.penalty(self.simulation.clear(), teacher)


def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    found: torch.Tensor = model(input_ids=row[None], **options).logits[0].float()
    return found
