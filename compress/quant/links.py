"""Which channels of a model can be scaled where they are made and scaled back where they are read.

What reads what is seen in one pass. That a link is exact is then proven, not concluded from names:
with its channels times powers of two where they leave their source, and divided by them where they
enter the readers, a pass gives the same bits, unless something else reads them or something between
is not linear in them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.quant.moments import linear_modules

if TYPE_CHECKING:
    import torch

_TOKENS = 16
_POWERS = (1.0, 2.0, 4.0, 0.5)
_CLOSE = 1e-4


@dataclass(frozen=True, eq=False)
class Link:
    """A module whose output channels some linear layers alone read, in full names of modules.

    ``source``: a norm, or a linear layer; ``offset``: what the norm adds to its weight, 1 for
    Gemma's; ``columns``: int64, by column of the readers the channel of the source.
    """

    source: str
    readers: tuple[str, ...]
    columns: torch.Tensor
    offset: float | None  # None: a linear layer

    @property
    def role(self) -> str:
        """The same for the like parts of all blocks."""
        return re.sub(r"\d+", "*", " ".join((self.source, *self.readers)))


@dataclass(frozen=True)
class Links:
    """``skipped``: by module why a linear layer is the reader of none."""

    found: list[Link]
    skipped: dict[str, str]


def find_links(model: Any) -> Links:
    """The links of a transformers model in eval mode, each reader in at most one of them.

    Norms and the linear layers that read them; v and o projection, and up and down projection,
    where all that is between is linear in v and up. Takes some fifteen passes of a few tokens,
    whatever the number of blocks: what a kind of link does in one block, it must do in all.
    """
    trace = _trace(model)
    skipped = dict.fromkeys(
        trace.linears, "reads neither a norm with a weight nor a layer beside it"
    )
    skipped.update({name: "did not run" for name in trace.linears if name not in trace.read})
    found = _norm_links(model, trace, skipped)
    done = {name for link in found for name in link.readers}
    found += _pair_links(model, trace, skipped, done)
    for link in found:
        for name in link.readers:
            skipped.pop(name)
    return Links(found, skipped)


@dataclass(frozen=True)
class _Trace:
    """One pass; ``read``: by linear layer that ran the norms whose outputs it read, "" for none."""

    tokens: torch.Tensor
    linears: dict[str, torch.nn.Linear]
    read: dict[str, set[str]]
    shared: set[int]


def _norm_links(model: Any, trace: _Trace, skipped: dict[str, str]) -> list[Link]:
    import torch

    readers = defaultdict(list)
    for name, sources in trace.read.items():
        if len(sources) == 1 and (norm := next(iter(sources))):
            readers[norm].append(name)
    candidates = []
    for norm, names in readers.items():
        module = model.get_submodule(norm)
        block = norm.rpartition(".")[0]
        offset = _offset(module)
        reason = ""
        if any(_is_shared(model, name, trace) for name in (norm, *names)):
            reason = "shares a weight with another layer"
        elif offset is None:
            reason = f"reads a norm that uses its weight in an unknown way: {norm}"
        elif any(n.startswith(f"{block}.") and n not in trace.read for n in trace.linears):
            reason = "a layer beside it did not run"
        if reason:
            skipped.update(dict.fromkeys(names, reason))
        else:
            candidates.append(Link(norm, tuple(names), torch.arange(len(module.weight)), offset))
    found = _proven(model, trace.tokens, candidates)
    for link in candidates:
        if link not in found:
            skipped.update(dict.fromkeys(link.readers, "something else reads its norm, too"))
    return found


def _pair_links(
    model: Any, trace: _Trace, skipped: dict[str, str], done: Collection[str]
) -> list[Link]:
    pairs = defaultdict(list)
    for name, sources in trace.read.items():
        if name in done or sources != {""} or _is_shared(model, name, trace):
            continue
        for writer in trace.read:
            columns = _columns(model, writer, name)
            if columns is not None and not _is_shared(model, writer, trace):
                pairs[name].append(Link(writer, (name,), columns, None))
                skipped[name] = "what is between it and the layers before it is not linear"
    found: list[Link] = []
    # Layers are in the order v after q and k, up after gate, so the last are tried first.
    while links := [candidates.pop() for candidates in pairs.values() if candidates]:
        for link in _proven(model, trace.tokens, links):
            found.append(link)
            del pairs[link.readers[0]]
    return found


def _trace(model: Any) -> _Trace:
    import torch

    linears = {name.removesuffix(".weight"): m for name, m in linear_modules(model).items()}
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = (torch.arange(_TOKENS) * 7 + 1)[None] % vocabulary
    tokens = tokens.to(next(model.parameters()).device)
    outputs: dict[tuple[int, int], str] = {}
    alive: list[Any] = []  # so that no other tensor is where one of them was
    read: dict[str, set[str]] = defaultdict(set)

    def leave(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[output.data_ptr(), output.numel()] = name
                alive.append(output)

        return hook

    def enter(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            read[name].add(outputs.get((args[0].data_ptr(), args[0].numel()), ""))
            alive.append(args[0])

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            if name in linears:
                hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            elif _may_be_norm(module):
                hooks.callback(module.register_forward_hook(leave(name)).remove)
        model(input_ids=tokens)
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return _Trace(tokens, linears, {name: read[name] for name in linears if name in read}, shared)


def _is_shared(model: Any, name: str, trace: _Trace) -> bool:
    """Whether another module has a parameter of this one."""
    return any(id(p) in trace.shared for p in model.get_submodule(name).parameters())


def _proven(model: Any, tokens: torch.Tensor, links: Iterable[Link]) -> list[Link]:
    """The links of all roles of which a pass gives the same bits."""
    import torch

    roles = defaultdict(list)
    for link in links:
        roles[link.role].append(link)
    return [
        link
        for same in roles.values()
        if torch.equal(_scaled(model, tokens, same, (1.0,)), _scaled(model, tokens, same, _POWERS))
        for link in same
    ]


def _scaled(
    model: Any, tokens: torch.Tensor, links: list[Link], powers: tuple[float, ...]
) -> torch.Tensor:
    """The model's first output with the links' channels times ``powers``, and back again."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with ExitStack() as hooks, torch.inference_mode():
        for link in links:
            source = model.get_submodule(link.source)
            choice = torch.randint(len(powers), (len(source.weight),), generator=generator)
            factor = torch.tensor(powers)[choice].to(source.weight)
            back = factor[link.columns.to(factor.device)]
            hook = source.register_forward_hook(lambda m, args, out, by=factor: out * by)
            hooks.callback(hook.remove)
            for name in link.readers:
                reader = model.get_submodule(name)
                hook = reader.register_forward_pre_hook(lambda m, args, by=back: (args[0] / by,))
                hooks.callback(hook.remove)
        return model(input_ids=tokens)[0]


def _may_be_norm(module: Any) -> bool:
    own = dict(module.named_parameters())
    weight = own.get("weight")
    return (
        weight is not None
        and set(own) <= {"weight", "bias"}
        and all(parameter.shape == (len(weight),) for parameter in own.values())
        and not any(True for _ in module.children())
    )


def _offset(norm: Any) -> float | None:
    """What a norm adds to its weight: the one with which scaling both scales its output."""
    import torch

    own = {name: parameter.detach().float() for name, parameter in norm.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(own["weight"]), generator=generator).to(own["weight"].device)
    factor = torch.rand(x.shape[1], generator=generator).to(x) + 1.5
    with torch.inference_mode():
        try:
            expected = torch.func.functional_call(norm, own, (x,)) * factor
        except TypeError:  # it takes more than a state, such as a gate
            return None
        for offset in (0.0, 1.0):
            scaled = {name: parameter * factor for name, parameter in own.items()}
            scaled["weight"] = (own["weight"] + offset) * factor - offset
            output = torch.func.functional_call(norm, scaled, (x,))
            if torch.allclose(output, expected, _CLOSE, _CLOSE):
                return offset
    return None


def _columns(model: Any, writer: str, reader: str) -> torch.Tensor | None:
    """By column of the reader the writer's channel, heads repeated as in grouped attention."""
    import torch

    parent = reader.rpartition(".")[0]
    if writer == reader or writer.rpartition(".")[0] != parent:
        return None
    channels = torch.arange(model.get_submodule(writer).out_features)
    wanted = model.get_submodule(reader).in_features
    if wanted == len(channels):
        return channels
    size = getattr(model.get_submodule(parent), "head_dim", None)
    if not size or wanted % len(channels) or len(channels) % size:
        return None
    repeats = wanted // len(channels)
    return channels.view(-1, size).repeat_interleave(repeats, 0).flatten()
