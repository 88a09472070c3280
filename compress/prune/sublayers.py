"""Attention and MLP of every block: where they are, what surrounds them, how they add up.

Names alone do not tell how a block uses its parts, so the structure is read off one pass of a few
tokens through the stock model and then held against the numbers: a block whose output is not its
input plus what the two add is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from compress.errors import BadInput
from compress.signals import block_input, find_blocks, run_base

if TYPE_CHECKING:
    import torch

ATTENTIONS = (("self_attn",), ("attn",), ("attention",), ("self_attention",))
MLPS = (("mlp",), ("feed_forward",), ("block_sparse_moe",), ("fc1", "fc2"))
_OUTPUTS = (
    *("o_proj", "out_proj", "dense", "c_proj", "wo"),
    *("down_proj", "down_proj_bias", "fc2", "fc_out", "dense_4h_to_h"),
)
_TOKENS = 8
_ROUNDINGS = 8  # of the residual's dtype, by which a sum of three may differ

Topology = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of a block, in full names of the model's modules and parameters.

    ``modules``: one, or the first and the last of several that have no module around them;
    ``outputs``: weights and biases of the projections that write what is added to the residual;
    ``before``: norms that it reads, perhaps as its neighbour does; ``after``: those between it and
    the residual.
    """

    modules: tuple[str, ...]
    outputs: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def last(self) -> str:
        """The module whose output is added to the residual."""
        return (*self.modules, *self.after)[-1]


@dataclass(frozen=True)
class Sublayers:
    """One block; ``topology``: whether its MLP reads what its attention has added."""

    attention: Sublayer
    mlp: Sublayer
    topology: Topology


def find_sublayers(model: Any) -> list[Sublayers]:
    """The sublayers of every block of a transformers model in eval mode.

    Runs eight tokens through it. Raises `BadInput`, naming the block and the reason, where the
    structure is not known or input + attention + MLP is not the block's output.
    """
    import torch

    blocks = find_blocks(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(1, _TOKENS + 1) % vocabulary
    parts = [(_part(block, ATTENTIONS, "attention"), _part(block, MLPS, "MLP")) for block in blocks]
    with ExitStack() as hooks, torch.inference_mode():
        traces = [hooks.enter_context(_traced(block)) for block in blocks]
        run_base(model, tokens[None].to(next(model.parameters()).device))
    names = {module: name for name, module in model.named_modules()}
    return [
        _examine(block, names[block], *part, trace)
        for block, part, trace in zip(blocks, parts, traces, strict=True)
    ]


@dataclass
class _Call:
    """A module's input and output; the values are copies, for a block may add in place."""

    source: torch.Tensor
    output: torch.Tensor
    source_value: torch.Tensor
    output_value: torch.Tensor


@contextmanager
def _traced(block: Any) -> Iterator[dict[str, _Call]]:
    """What passes through a block (under the name "") and its children while hooks are on."""
    calls: dict[str, _Call] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if args or "hidden_states" in kwargs:
                source = block_input(args, kwargs)
                calls[name] = _Call(source, source, source.clone(), source)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if name in calls:
                calls[name].output, calls[name].output_value = output, output.clone()

        return hook

    with ExitStack() as hooks:
        for name, module in (("", block), *block.named_children()):
            hooks.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave(name)).remove)
        yield calls


def _part(block: Any, known: Sequence[tuple[str, ...]], what: str) -> tuple[str, ...]:
    children = dict(block.named_children())
    found = [names for names in known if all(name in children for name in names)]
    if len(found) != 1:
        _refuse(f"no single {what} that is known", type(block).__name__, ", ".join(children))
    return found[0]


def _examine(
    block: Any, name: str, attention: tuple[str, ...], mlp: tuple[str, ...], calls: dict[str, _Call]
) -> Sublayers:
    for child in (*attention, *mlp):
        if child not in calls:
            _refuse("it did not run", f"{name}.{child}")
    norms = {
        child: call
        for child, call in calls.items()
        if child
        and child not in (*attention, *mlp)
        and any(True for _ in _parameters(block, child))
    }
    parts = (attention, mlp)
    around = [_surroundings(part, calls, norms) for part in parts]
    start, end = calls[""].source_value, calls[""].output_value
    added = [
        calls[(*part, *after)[-1]].output_value
        for part, (_, after) in zip(parts, around, strict=True)
    ]
    if not _sum_to(end, start, *added):
        _refuse("input + attention + MLP is not the block's output", name, type(block).__name__)
    for part, (_, after) in zip(parts, around, strict=True):
        if any(key.endswith("bias") for child in after for key, _ in _parameters(block, child)):
            _refuse("a norm after it adds a bias", f"{name}.{part[-1]}", ", ".join(after))
    reader = calls[(*around[1][0], *mlp)[0]].source_value
    topology: Topology = "sequential"
    if not _sum_to(reader, start, added[0]):
        topology = "parallel"
        if not _sum_to(reader, start):
            _refuse("its MLP reads an unknown state", name, type(block).__name__)
    found = [
        Sublayer(
            tuple(f"{name}.{child}" for child in part),
            tuple(f"{name}.{output}" for output in _outputs(block, name, part)),
            tuple(f"{name}.{child}" for child in before),
            tuple(f"{name}.{child}" for child in after),
        )
        for part, (before, after) in zip(parts, around, strict=True)
    ]
    return Sublayers(found[0], found[1], topology)


def _surroundings(
    part: tuple[str, ...], calls: dict[str, _Call], norms: dict[str, _Call]
) -> tuple[list[str], list[str]]:
    """The norms whose outputs a sublayer reads, and the chain of norms that reads its own."""
    before = [norm for norm, call in norms.items() if _same(call.output, calls[part[0]].source)]
    after: list[str] = []
    tail = calls[part[-1]].output
    while following := [n for n in norms if n not in after and _same(norms[n].source, tail)]:
        after.append(following[0])
        tail = norms[following[0]].output
    return before, after


def _outputs(block: Any, name: str, part: tuple[str, ...]) -> list[str]:
    """The parameters of a sublayer's output projections, experts and shared experts included."""
    names = [f"{child}.{key}" for child in part for key, _ in _parameters(block, child)]
    found = [key for key in names if any(piece in _OUTPUTS for piece in key.split("."))]
    if not found:
        _refuse("no output projection that is known", f"{name}.{part[-1]}")
    return found


def _parameters(block: Any, child: str) -> Iterator[tuple[str, Any]]:
    return iter(block.get_submodule(child).named_parameters())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, both alive, are one; dropout hands on its input when not training."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _sum_to(total: torch.Tensor, *terms: torch.Tensor) -> bool:
    """Whether the terms add up, up to the roundings of a sum in the total's dtype."""
    import torch

    wide = [term.double().reshape(total.shape) for term in terms]
    bound = _ROUNDINGS * torch.finfo(total.dtype).eps * sum(term.abs() for term in wide)
    return bool(((sum(wide) - total.double()).abs() <= bound).all())


def _refuse(reason: str, where: str, got: str | None = None) -> NoReturn:
    raise BadInput(f"attention and MLP cannot be removed apart: {reason}", where=where, got=got)
