"""Large input columns of linear layers made smaller, once and for all, in the weights.

CrossQuant (arXiv 2410.07505) divides an activation x_ij by t_i^a c_j^(1-a), t being the largest of
its token and c of its column. An integer product cannot take back what differs between columns, so
here c_j is calibrated and c_j^(1-a) goes into the columns of the weight, and out of what makes x:
the norm before it, or the linear layer (as SmoothQuant, arXiv 2211.10438, eq. 4, does, with the
activations' term alone). What is left is one scale a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.checkpoint import FLOATS, TensorInfo
from compress.errors import BadInput
from compress.quant.links import Link, find_links
from compress.quant.moments import Moments

if TYPE_CHECKING:
    import torch

ALPHA = 0.5


@dataclass(frozen=True, eq=False)
class Fold:
    """What becomes of a checkpoint's tensors, by their names.

    ``vectors``: new weights and biases of norms and biases of linear layers, in their own dtypes;
    ``columns``: float64 [columns], what those of a linear weight are multiplied by, and its inputs
    have become smaller by; ``rows``: float64 [rows], what those of a linear weight are divided by;
    ``skipped``: linear weights whose inputs stay as they are, and why.
    """

    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint after folding: itself where nothing changes.

        Linear weights that change come as float32, for they are to be quantized.
        """
        if name in self.vectors:
            return self.vectors[name]
        if name not in self.columns and name not in self.rows:
            return tensor
        wide = tensor.double()
        if name in self.columns:
            wide = wide * self.columns[name].to(wide)
        if name in self.rows:
            wide = wide / self.rows[name].to(wide)[:, None]
        return wide.float()


def plan_fold(
    model: Any,
    moments: Mapping[str, Moments],
    infos: Mapping[str, TensorInfo],
    *,
    alpha: float = ALPHA,
) -> Fold:
    """How to divide the inputs of linear layers by ``s_j = c_j^(1-alpha) / geometric mean``.

    ``model``: the checkpoint's, in eval mode, left as it is; ``moments``: of its layers, by name of
    weight (`measure_moments`); ``infos``: `tensor_infos()` of the checkpoint, for the dtypes.
    Layers that read one norm share s, heads that read one value head share its; columns that are
    always 0 have s = 1. See `find_links` for which layers can be folded; where no reader is in
    ``moments`` nothing is. Norms are rounded to their dtype first, and the weights' columns
    multiplied by what the norms then have really been divided by, so that in float32 the model
    computes what it did up to rounding. Biases are only as exact as their dtype.

    Raises `BadInput` for an ``alpha`` that is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise BadInput("must be between 0 and 1", where="alpha", got=alpha)
    links = find_links(model)
    skipped = {f"{name}.weight": reason for name, reason in links.skipped.items()}
    fold = Fold(skipped=skipped)
    for link in links.found:
        names = [f"{name}.weight" for name in link.readers]
        if reason := _reason(model, link, moments, infos):
            skipped.update(dict.fromkeys(names, reason))
            continue
        s = _scales(link, [moments[name] for name in names if name in moments], alpha)
        if link.offset is not None:
            s = _fold_norm(fold, model, link, s, infos)
        else:
            fold.rows[f"{link.source}.weight"] = s
            bias = f"{link.source}.bias"
            if bias in infos:
                fold.vectors[bias] = _stored(_parameter(model, bias) / s, infos[bias])
        fold.columns.update(dict.fromkeys(names, s[link.columns]))
    return fold


def _reason(
    model: Any, link: Link, moments: Mapping[str, Moments], infos: Mapping[str, TensorInfo]
) -> str:
    """Why a link cannot be folded; "" if it can."""
    if not any(f"{name}.weight" in moments for name in link.readers):
        return "has no moments"
    touched = [f"{name}.weight" for name in (link.source, *link.readers)]
    if getattr(model.get_submodule(link.source), "bias", None) is not None:
        touched.append(f"{link.source}.bias")
    for name in touched:
        shape = tuple(_parameter(model, name).shape)
        if name not in infos or infos[name].shape != shape:
            return f"{name} is not stored under its own name"
        if infos[name].dtype not in FLOATS:
            return f"{name} is stored as {infos[name].dtype}"
    return ""


def _scales(link: Link, moments: list[Moments], alpha: float) -> torch.Tensor:
    """s, float64 by channel of the source."""
    import torch

    columns = link.columns
    peak = torch.zeros(int(columns.max()) + 1, dtype=torch.float64)
    for measured in moments:
        peak.scatter_reduce_(0, columns, measured.peak.cpu(), "amax")
    logs = torch.where(peak > 0, peak, 1.0).log()
    alive = logs[peak > 0]
    middle = alive.mean() if len(alive) else 0.0
    return torch.where(peak > 0, ((logs - middle) * (1 - alpha)).exp(), 1.0)


def _fold_norm(
    fold: Fold, model: Any, link: Link, s: torch.Tensor, infos: Mapping[str, TensorInfo]
) -> torch.Tensor:
    """Put the norm's new weight and bias into ``fold``; what it has really been divided by."""
    import torch

    name, bias, offset = f"{link.source}.weight", f"{link.source}.bias", link.offset or 0.0
    old = _parameter(model, name)
    new = _stored((old + offset) / s - offset, infos[name])
    real = (old + offset) / (new.double() + offset)
    # Where rounding leaves nothing to divide by, the channel stays as it is.
    whole = (real > 0) & real.isfinite() & new.isfinite()
    real = torch.where(whole, real, 1.0)
    fold.vectors[name] = torch.where(whole, new, _stored(old, infos[name]))
    if bias in infos:
        fold.vectors[bias] = _stored(_parameter(model, bias) / real, infos[bias])
    return real


def _parameter(model: Any, name: str) -> torch.Tensor:
    return model.get_parameter(name).detach().double().cpu()


def _stored(value: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    import torch

    return value.to(getattr(torch, FLOATS[info.dtype]))
