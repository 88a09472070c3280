"""What the result of a training depends on, beside the machine, as text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from compress.errors import BadInput

if TYPE_CHECKING:
    import torch

    from compress.quant.qat.settings import QatSettings
    from compress.quant.qtensor import QTensor, Scheme


def identity(
    settings: QatSettings,
    tokens: torch.Tensor,
    targets: Mapping[str, Scheme],
    start: Mapping[str, QTensor],
    **more: object,
) -> str:
    """JSON of all of it; ``every`` is not, as it changes no bit. ``more``: anything JSON can say.

    Raises `BadInput` for a start without a target, or with steps that are not learned.
    """
    if strange := start.keys() - targets.keys():
        raise BadInput("nothing to train from this start", where=min(strange))
    if start and settings.scale != "lsq":
        raise BadInput("only learned steps have a start", where="qat.scale", got=settings.scale)
    stated = asdict(settings)
    del stated["every"]
    return json.dumps(
        {
            "settings": stated,
            "tokens": [list(tokens.shape), _sha256(tokens)],
            "targets": {name: asdict(scheme) for name, scheme in targets.items()},
            "start": {name: _sha256(start[name].scale.float()) for name in sorted(start)},
            **more,
        }
    )


def check_activations(settings: QatSettings, activations: int | None) -> None:
    """Raise `BadInput` for a width that is not known, or that `TokenBits` needs."""
    if activations is not None and not 2 <= activations <= 8:
        raise BadInput(
            "no such width", where="activations.bits", got=activations, expected="2 to 8"
        )
    if settings.token_bits is not None and activations is None:
        raise BadInput(
            "narrow tokens need quantized activations",
            where="qat.token_bits",
            mend="set activations.bits",
        )


def _sha256(value: torch.Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().numpy()).hexdigest()
