"""A directory of the dfloat11 package (arXiv 2504.11651) as an ordinary dense checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.checkpoint import layout, loading
from compress.checkpoint.checkpoint import CHUNK, Checkpoint, TensorInfo
from compress.checkpoint.df11_layout import (
    CODES,
    WHOLE,
    Stored,
    Weight,
    find_units,
    find_weights,
    read_patterns,
)
from compress.checkpoint.safetensors_reader import Header, read_into, tensor_at
from compress.checkpoint.source import Source
from compress.codec import df11
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import numpy as np
    import torch
    from typing_extensions import Buffer


class DF11Checkpoint(Checkpoint):
    """The weights that DFloat11's units stand for, decoded on the CPU; all else as it is stored.

    ``config`` is that of the dense model. Memory: one unit, kept until another is asked for. Get
    one from `open`, which raises `BadInput` for settings or an architecture that is not known (the
    latter at the first use of `tensor_infos`) and `Corrupt` where parts are missing or contradict
    each other.
    """

    def __init__(self, source: Source, config: dict[str, Any], headers: dict[str, Header]) -> None:
        dense = {key: value for key, value in config.items() if key != layout.DF11}
        super().__init__(source, dense, headers)
        self._patterns = read_patterns(config, source.path)
        self._units = find_units(source.path, headers)
        self._last: tuple[str, np.ndarray] | None = None

    def stored(self, name: str) -> tuple[str, int, int]:
        """As of any checkpoint; `BadInput` for a weight that has no bytes of its own."""
        if name in self._places:
            raise BadInput("is stored in a unit with others", where=tensor_at(self.path, name))
        return super().stored(name)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[Buffer]:
        if name not in self._places:
            yield from super().chunks(name, size)
            return
        data = self._words(name).data.cast("B")
        for start in range(0, len(data), size):
            yield data[start : start + size]

    def read(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._places:
            return super().read(name)
        # A copy, for the unit's are those of its next reader.
        words = torch.from_numpy(self._words(name).copy())
        return words.view(torch.bfloat16).reshape(self._places[name][1].shape)

    def load_model(self, dtype: Any = "auto", device: Any = "cpu") -> Any:
        tensors = {name: self.read(name) for name in self.tensor_infos()}
        return loading.load_model(self.path, self.config, dtype, device, tensors)

    @cached_property
    def _weights(self) -> dict[str, list[Weight]]:
        """The weights of each unit."""
        found = find_weights(self._units.values(), self._patterns, self.path, self.config)
        for unit, weights in found.items():
            ends = self._part(unit, "split_positions").view("<i8").tolist()
            if ends != [weight.end for weight in weights[:-1]]:
                raise Corrupt("split_positions cut the weights elsewhere", where=self._where(unit))
        return found

    @cached_property
    def _places(self) -> dict[str, tuple[Stored, Weight]]:
        return {
            weight.name: (self._units[unit], weight)
            for unit, weights in self._weights.items()
            for weight in weights
        }

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        inside = {entry.name for unit in self._units.values() for _, entry in unit.parts.values()}
        if layout.SINGLE not in self.files and not (self.path / layout.INDEX).is_file():
            raise Corrupt(f"no {layout.SINGLE}, which holds the rest", where=self.path, mend=WHOLE)
        infos: dict[str, TensorInfo] = {}
        for name, (file, entry) in self._entries.items():
            unit = name.removesuffix(f".{CODES}")
            new = [] if name in inside else [self._info(self._home(file), entry)]
            if unit != name and unit in self._units:
                new = [
                    self._weight_info(weight, self._units[unit], file)
                    for weight in self._weights[unit]
                ]
            for info in new:
                if info.name in infos:
                    raise Corrupt("is stored twice", where=tensor_at(self.path, info.name))
                infos[info.name] = info
        return {
            info.name: info for file in self.files for info in infos.values() if info.file == file
        }

    def _weight_info(self, weight: Weight, unit: Stored, file: str) -> TensorInfo:
        """``stored_nbytes`` is the weight's share of its unit."""
        before, after = (unit.nbytes * words // unit.words for words in (weight.start, weight.end))
        nbytes = 2 * (weight.end - weight.start)
        home = self._home(file)
        return TensorInfo(weight.name, "BF16", weight.shape, nbytes, home, False, after - before)

    def _home(self, file: str) -> str:
        """The file that a tensor counts to.

        Loaders of ordinary models take ``model.safetensors`` for the only shard. DFloat11 writes
        one for what is left over by the others, so its tensors go to the first of those.
        """
        others = [other for other in self.files if other != layout.SINGLE]
        return others[0] if file == layout.SINGLE and others else file

    def _words(self, name: str) -> np.ndarray:
        """A weight's bf16 words (uint16), 1-D."""
        unit, weight = self._places[name]
        if self._last is None or self._last[0] != unit.name:
            self._last = None  # two units need not be in memory at a time
            self._last = (unit.name, self._decode(unit.name))
        return self._last[1][weight.start : weight.end]

    def _decode(self, unit: str) -> np.ndarray:
        luts = self._part(unit, "luts").reshape(self._units[unit].parts["luts"][1].shape)
        codes, rest = self._part(unit, CODES), self._part(unit, "sign_mantissa")
        positions = self._part(unit, "output_positions").view("<u4")
        return df11.decode_unit(
            df11.Unit(luts, codes, rest, positions, self._part(unit, "gaps")), self._where(unit)
        )

    def _part(self, unit: str, part: str) -> np.ndarray:
        import numpy as np

        file, entry = self._units[unit].parts[part]
        data = np.empty(entry.nbytes, np.uint8)
        read_into(self.path / file, entry.start, data.data)
        return data

    def _where(self, unit: str) -> str:
        file, entry = self._units[unit].parts[CODES]
        return tensor_at(self.path / file, entry.name)
