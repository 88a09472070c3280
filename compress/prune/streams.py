"""Calibration text on its way through a whole model and a pruned one, a few blocks at a time."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.prune.fitness import BLOCK, Unit
from compress.prune.healing_gaps import Gap, Unhealable
from compress.signals import block_input, block_output, find_blocks, ordinary_tokens, run_base

if TYPE_CHECKING:
    import torch

_PROBE = 32  # tokens that show how a block is built
_TOLERANCE = 1e-3


@dataclass
class _Run:
    """One sequence in the ``active`` blocks; the other blocks pass on what they get."""

    active: Sequence[int]
    state: torch.Tensor | None  # what enters the first of them; None: the embeddings
    silent: bool  # removed attention and MLPs give zeros
    shifted: Any = None  # a projection, and what to add to its output
    shift: Any = None
    entered: Any = None  # the state before and after the last active block
    left: Any = None
    given: Any = None  # by the last of the removed attentions and MLPs that ran
    last: Any = None  # the last projection that ran, and its output
    projected: Any = None


class Streams:
    """All sequences' states in the whole model and in the pruned one, taken from gap to gap.

    The pruned ones halt before the block that is to be healed, and pass it again once it is.
    ``tokens``: int64 [sequences, length]; ``parts``: the modules of ``removed`` units that are not
    whole blocks. Sequences may run side by side, one in each thread.
    """

    def __init__(
        self,
        model: Any,
        tokens: torch.Tensor,
        removed: Collection[Unit],
        parts: Mapping[Unit, torch.nn.Module],
    ) -> None:
        self._model, self._blocks = model, find_blocks(model)
        self._skipped = {index for kind, index in removed if kind == BLOCK}
        self._gone = [parts[unit] for unit in removed if unit[0] != BLOCK]
        self._rows = tokens.to(next(model.parameters()).device)[:, None]
        self._whole: list[torch.Tensor | None] = [None] * len(tokens)
        self._pruned: list[torch.Tensor | None] = [None] * len(tokens)
        self._whole_at = self._pruned_at = 0  # the blocks that the states are about to enter
        self._changes: dict[Any, torch.Tensor] = {}  # by healed projection
        self._beside: tuple[None, ...] | None = None  # what blocks return beside the state
        self._current = threading.local()

    @contextmanager
    def watching(self, befores: Collection[int]) -> Iterator[None]:
        """Take over the model's blocks, and the outputs of the projections in ``befores``."""
        hooks = [part.register_forward_hook(self._give) for part in self._gone]
        gone = {module for part in self._gone for module in part.modules()}
        own = [vars(block).get("forward") for block in self._blocks]  # as accelerate sets it
        try:
            for before in befores:
                hooks += [
                    module.register_forward_hook(self._project)
                    for module in self._blocks[before].modules()
                    if module not in gone and self._is_projection(module)
                ]
            for index, block in enumerate(self._blocks):
                block.forward = partial(self._forward, index, block.forward)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block, forward in zip(self._blocks, own, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward

    def last_projection(self, before: int) -> tuple[Any, float]:
        """The last projection left in block ``before``, and the factor at which it is added.

        Found by shifting its output: the block's output must shift alike, up to a constant factor.
        Raises `BadInput` where it does not.
        """
        import torch

        where = f"block {before} of {type(self._model).__name__}"
        row, state, here = self._rows[0][:, :_PROBE], self._pruned[0], self._here(before)
        state = None if state is None else state[:, :_PROBE]
        plain = self._run(row, state, here, silent=True)
        if plain.last is None:
            raise Unhealable("cannot be healed: no linear projection onto the stream", where=where)
        size = float(plain.projected.square().mean().sqrt()) or 1.0
        noise = torch.randn(plain.projected.shape, generator=torch.Generator().manual_seed(0))
        shift = (size * noise).to(row.device)
        moved = self._run(row, state, here, True, plain.last, shift)
        # Without the first token, whose massive state would drown the rest in rounding.
        shift, change = shift.view_as(plain.left)[0, 1:], (moved.left - plain.left)[0, 1:]
        share = float((change * shift).sum() / shift.square().sum())
        if not (change - share * shift).norm() < _TOLERANCE * abs(share) * shift.norm():
            raise Unhealable(
                "cannot be healed: its last projection is not simply added to the stream",
                where=where,
                got=f"{self.name(plain.last, before)}, with a norm, experts or the like after it",
                mend="prune without healing",
            )
        return plain.last, share

    def sample(
        self, gap: Gap, share: float, index: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take one sequence to a gap: what is added before it, and what should have been added.

        The first is ``share`` times the last projection's output for the ordinary tokens, the
        second that plus what the pruned stream lacks of the whole model's after the gap. The third
        is as the first, for all other tokens. All float64 [tokens, d].
        """
        import torch

        row = self._rows[index]
        whole = self._run(row, self._whole[index], range(self._whole_at, gap.last + 1))
        pruned = self._run(row, self._pruned[index], self._here(gap.before), silent=True)
        self._whole[index] = whole.entered if gap.middle else whole.left
        self._pruned[index] = pruned.entered
        state = pruned.left[0]
        target = (whole.entered + whole.given if gap.middle else whole.left)[0]
        attended = torch.ones(len(target), dtype=torch.bool, device=target.device)
        keep = ordinary_tokens(state, target, attended)
        added = share * pruned.projected.view_as(state).double()
        lack = target[keep].double() - state[keep].double()
        return added[keep], added[keep] + lack, added[~keep]

    def heal(self, last: Any, change: torch.Tensor, gap: Gap) -> None:
        """From here on, all sequences sampled, the outputs of ``last`` are times ``change``."""
        self._changes[last] = change.float()
        self._pruned_at = gap.before
        self._whole_at = gap.last if gap.middle else gap.last + 1

    def name(self, module: Any, block: int) -> str:
        """The module's name inside of its block."""
        return next(n for n, found in self._blocks[block].named_modules() if found is module)

    def _here(self, before: int) -> list[int]:
        blocks = range(self._pruned_at, before + 1)
        return [block for block in blocks if block not in self._skipped]

    def _run(
        self,
        row: torch.Tensor,
        state: torch.Tensor | None,
        active: Sequence[int],
        silent: bool = False,
        shifted: Any = None,
        shift: Any = None,
    ) -> _Run:
        import torch

        run = self._current.run = _Run(active, state, silent, shifted, shift)
        with torch.inference_mode():
            run_base(self._model, row)
        return run

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """What block ``index`` does in place of its own ``forward``."""
        run, state = self._current.run, block_input(args, kwargs)
        if index not in run.active:
            # Copies here and below: a block may add to its input in place.
            state = state if index or run.state is None else run.state.clone()
            return state if self._beside is None else (state, *self._beside)
        if index == run.active[-1]:
            run.entered = state.clone()
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):  # known in time: the first run begins with block 0
            self._beside = (None,) * (len(output) - 1)
        if index == run.active[-1]:
            run.left = block_output(output)
        return output

    def _give(self, module: Any, args: Any, output: Any) -> Any:
        run, value = self._current.run, block_output(output)
        if not run.silent:
            run.given = value.clone()
            return output
        nothing = value.new_zeros(value.shape)
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

    def _project(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        run = self._current.run
        if module in self._changes:
            output = output @ self._changes[module]
        if module is run.shifted:
            output = output + run.shift
        run.last, run.projected = module, output
        return output

    def _is_projection(self, module: Any) -> bool:
        import torch
        from transformers.pytorch_utils import Conv1D

        width = self._model.config.get_text_config(decoder=True).hidden_size
        linear = isinstance(module, torch.nn.Linear) and module.out_features == width
        return linear or (isinstance(module, Conv1D) and module.nf == width)
