"""What may be removed of a loaded model, what it saves, and the model without it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress import codec
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, did_you_mean
from compress.prune.fitness import BLOCK, Removal, Unit
from compress.prune.search import removable
from compress.prune.settings import block_count
from compress.prune.sublayer_parts import sublayer_parts
from compress.prune.sublayer_surgery import unit_tensors
from compress.prune.sublayers import Sublayers, find_sublayers
from compress.prune.surgery import find_stack
from compress.signals import Part, block_input, find_blocks

if TYPE_CHECKING:
    import torch

KINDS = {
    "block": (BLOCK,),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "joint": ("attention", "mlp"),
}
MEASURES = ("parameters", "flops", "coded_bytes")


@dataclass(frozen=True)
class Units:
    """The units of one granularity in a loaded model.

    ``kinds`` of the units; ``parts``: the modules that add what attention and MLPs give to the
    residual stream; ``sublayers``: by block, none where whole blocks are the units; ``gone``: what
    the model's config names as skipped, removed before.
    """

    kinds: tuple[str, ...]
    blocks: int
    parts: Mapping[Unit, torch.nn.Module]
    sublayers: list[Sublayers]
    gone: frozenset[Unit] = frozenset()

    def free(self, protect: Collection[int] | None = None) -> list[Unit]:
        """Those that are left and may go; ``protect`` as for `protected_blocks`."""
        units = [unit for kind in self.kinds for unit in removable(kind, self.blocks, protect)]
        return [unit for unit in units if unit not in self.gone]

    def to_score(self, model: Any, kind: str) -> list[Part] | None:
        """One kind as the calibration pass wants it."""
        if kind == BLOCK:
            return None
        return sublayer_parts(model, self.sublayers, "mlp" if kind == "mlp" else "attention")


def find_units(model: Any, granularity: str) -> Units:
    """The units of a transformers model in eval mode; ``granularity`` is one of `KINDS`.

    Raises `BadInput` for an unknown granularity, and as `find_blocks` and `find_sublayers`.
    """
    if granularity not in KINDS:
        raise BadInput(
            "no such granularity", got=granularity, mend=did_you_mean(granularity, KINDS)
        )
    kinds = KINDS[granularity]
    if kinds == (BLOCK,):
        return Units(kinds, len(find_blocks(model)), {}, [])
    sublayers = find_sublayers(model)
    parts = {
        (kind, i): model.get_submodule(getattr(block, kind).last)
        for i, block in enumerate(sublayers)
        for kind in kinds
    }
    return Units(kinds, len(sublayers), parts, sublayers, gone_before(model.config))


def gone_before(config: Any) -> frozenset[Unit]:
    """The units that a model's config (transformers') names as skipped; `BadInput` if unknown."""
    from compress.hf import skipped_parts

    return frozenset((kind, i) for i, kinds in skipped_parts(config).items() for kind in kinds)


@contextmanager
def without(
    model: Any, removal: Removal, parts: Mapping[Unit, torch.nn.Module] | None = None
) -> Iterator[None]:
    """The model with the units of ``removal`` adding nothing; ``parts`` as in `Units`.

    They still run: this is for measuring, and for proofs.
    """
    import torch

    def passes(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = block_input(args, kwargs)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def nothing(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    blocks = find_blocks(model)
    with ExitStack() as hooks:
        for kind, index in sorted(removal):
            module = blocks[index] if kind == BLOCK else (parts or {})[kind, index]
            hook = passes if kind == BLOCK else nothing
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def savings(
    measure: str, model: Any, checkpoint: Checkpoint, units: Units, length: int
) -> tuple[dict[Unit, int], int]:
    """What the removal of each unit saves, and what the whole model has, by one of `MEASURES`.

    "parameters": numbers in the tensors; "coded_bytes": the bytes these take once `encode_weights`
    has coded them, tables included; "flops": floating-point operations for one sequence of
    ``length`` tokens without a cache, counted while it runs (torch's `FlopCounterMode`).
    """
    if measure == "flops":
        return _flops(model, units, length)
    infos = checkpoint.tensor_infos()

    def size(name: str) -> int:
        info = infos[name]
        if measure == "coded_bytes":
            return codec.predict(info.dtype, checkpoint.chunks(name), info.shape)
        return 8 * info.nbytes // codec.dtype_bits(info.dtype)

    sizes = {name: size(name) for name in infos}
    stack = find_stack(infos, block_count(checkpoint.config))
    tensors = unit_tensors(infos, stack, units.kinds)
    return {u: sum(map(sizes.__getitem__, tensors[u])) for u in tensors}, sum(sizes.values())


def _flops(model: Any, units: Units, length: int) -> tuple[dict[Unit, int], int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3]))

    def experts(tokens: Any, weights: Any, *_: Any, **__: Any) -> int:
        return int(2 * tokens[0] * weights[1] * weights[2])

    # What torch does not count: the CPU's attention, and products with each token's own matrix.
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._grouped_mm: experts,
    }
    if own := getattr(torch.ops.transformers, "grouped_mm_fallback", None):
        formulas[own] = experts
    tokens = torch.arange(length) % model.get_input_embeddings().num_embeddings
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, torch.inference_mode():
        model(input_ids=tokens[None].to(next(model.parameters()).device), use_cache=False)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    names = {module: name for name, module in model.named_modules()}

    def modules(unit: Unit) -> Collection[str]:
        kind, index = unit
        if kind == BLOCK:
            return [names[find_blocks(model)[index]]]
        sublayer = getattr(units.sublayers[index], kind)
        return {*sublayer.modules, *sublayer.after}

    every = [(kind, i) for kind in units.kinds for i in range(units.blocks)]
    saved = {u: sum(counts.get(f"{root}.{name}", 0) for name in modules(u)) for u in every}
    return saved, counts[root]
