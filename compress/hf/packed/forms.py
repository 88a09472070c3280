"""Packed weights as tensors: a 1-D uint8 tensor, and the numbers that the host knows of it.

The numbers ("ints") are ``[form, dtype, rows, cols, nbytes, …]``, for a layout of docs/PACKED.md
those of `compress.codec.packed.Layout.ints`; kernels are launched from them, so that a GPU's memory
is never read for a header. Tensors of more dimensions than two are matrices of all but their last.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import torch

from compress.codec import (
    HEADER_MAX,
    MAGIC,
    Header,
    decode,
    decode_part,
    encode,
    packed,
    read_header,
)
from compress.errors import BadInput, Corrupt, did_you_mean
from compress.hf.packed import FORMS

STORED = 0
DTYPES = packed.cuda.dtypes()
_LENDING = threading.Lock()  # of the array below
_lent = np.empty(0, np.uint8)


def form_of(ints: list[int]) -> str:
    """``stored``, ``fast`` or ``dense``."""
    return FORMS[ints[0]]


def dtype_of(ints: list[int]) -> torch.dtype:
    """The dtype of the weights."""
    return DTYPES[packed.DTYPES[ints[1] - 1]]


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels, and not the codec, work on ``tensor``."""
    return tensor.is_cuda


def form_for(device: torch.device, dtype: torch.dtype) -> str:
    """The form that suits weights on a device: ``stored`` on the CPU, else as the codec chooses.

    ``fast`` where the driver does not tell how fast the memory is; ``dense`` for fp16, which
    ``fast`` does not make smaller.
    """
    if device.type != "cuda":
        return "stored"
    if dtype == torch.float16:
        return "dense"
    gpu = torch.cuda.get_device_properties(device)
    # kHz, bits, and two transfers a clock.
    bandwidth = 2 * getattr(gpu, "memory_clock_rate", 0) * getattr(gpu, "memory_bus_width", 0) / 8e6
    clock = getattr(gpu, "clock_rate", 0) / 1e3
    if not bandwidth or not clock:
        return "fast"
    return packed.choose(bandwidth, clock, gpu.multi_processor_count)


def prepare(blob: torch.Tensor, ints: list[int], exact: str) -> None:
    """Compile and load, if ``blob`` is on a GPU, the kernels that will work with it.

    Raises `Missing` where they cannot be compiled, `BadInput` for a GPU that is too old.
    """
    if on_gpu(blob):
        layout = packed.Layout.from_ints(ints)
        packed.cuda.prepare(blob.device, layout, products=exact == "weights")


def pack(
    tensor: torch.Tensor, form: str, name: str = "", *, smaller: bool = True
) -> tuple[torch.Tensor, list[int]] | None:
    """The packed weight and its ints; None where ``tensor`` cannot be packed or would not shrink.

    ``tensor``: (..., cols), of bf16 or fp16 to be packed, on the CPU or a GPU, where the result is
    too; ``name``: under which its coded bytes could be stored; ``smaller=False``: even if it grows.
    Raises `BadInput` for an unknown form and for ``stored`` on a GPU.
    """
    if form not in FORMS:
        raise BadInput(f"unknown form '{form}' of packed weights", mend=did_you_mean(form, FORMS))
    kind = next((kind for kind, dtype in DTYPES.items() if dtype == tensor.dtype), None)
    if kind is None or tensor.dim() < 2 or not tensor.numel():
        return None
    matrix = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
    if form == "stored":
        if on_gpu(tensor):
            raise BadInput("'stored' is for weights on the CPU", mend="use 'fast' or 'dense'")
        values = matrix.view(torch.uint8).flatten().numpy()
        coded = bytearray().join(encode(name, kind, tensor.shape, [values]))
        blob = torch.frombuffer(coded, dtype=torch.uint8)
        ints = [STORED, packed.DTYPES.index(kind) + 1, *matrix.shape, blob.numel()]
    elif on_gpu(tensor):
        blob, layout = packed.cuda.pack(matrix, form, name or None)
        ints = layout.ints()
    else:
        blob = torch.from_numpy(
            packed.pack(matrix.view(torch.uint16).numpy(), kind, form, where=name or None)
        )
        ints = packed.parse(blob[: packed.HEADER].numpy().data).ints()
    return None if smaller and blob.numel() >= tensor.nbytes else (blob, ints)


def from_stored(
    blob: torch.Tensor, where: str | None = None
) -> tuple[torch.Tensor, list[int]] | None:
    """A coded tensor of docs/FORMAT.md as a packed weight, and its ints.

    Only its header is looked at, for bytes that have been decoded before; ``where``: the tensor's
    name. None where it is no matrix of 16-bit floats or no smaller than one. Raises `Corrupt`,
    `BadInput`.
    """
    header = read_header(blob[:HEADER_MAX].numpy().data, where)
    ints = _stored_ints(header, blob.numel())
    return None if ints is None or blob.numel() >= header.nbytes else (blob, ints)


def check(blob: torch.Tensor, where: str | None = None) -> list[int]:
    """The ints of a packed weight of any form, all bytes of which have been proven sound.

    Raises `Corrupt`, or `BadInput` for what only a newer release can read and for a coded tensor
    that is no matrix of 16-bit floats.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        got = f"{str(blob.dtype).removeprefix('torch.')} {tuple(blob.shape)}"
        raise Corrupt("is no packed weight", where=where, got=got, expected="uint8 (n,)")
    data = blob.detach().cpu().contiguous().numpy()
    if data[:4].tobytes() != MAGIC:
        return packed.check(data, where).ints()
    try:
        decode(data)
    except Corrupt as error:
        raise Corrupt(str(error), where=where) from error
    if (ints := _stored_ints(read_header(data[:HEADER_MAX].data), blob.numel())) is None:
        raise BadInput("cannot stay packed", where=where, expected="a matrix of bf16 or fp16")
    return ints


def rows_of(
    blob: torch.Tensor, ints: list[int], first_row: int = 0, rows: int | None = None
) -> torch.Tensor:
    """Rows of the weight as they were before packing, (rows, cols); all that follow if None.

    The bytes must have been checked. Of a weight on a GPU or in a layout for one whole tiles of 32
    rows are decoded, of a stored one segments of 2^20 words.
    """
    rows = ints[2] - first_row if rows is None else rows
    if ints[0] == STORED:
        return _stored_rows(blob, ints, first_row, rows)
    before = first_row % packed.TILE_ROWS
    first_row -= before
    if on_gpu(blob):
        layout = packed.Layout.from_ints(ints)
        return packed.cuda.unpack(blob, layout, first_row, before + rows)[before:]
    words = packed.unpack(blob.numpy(), slice(first_row, first_row + before + rows))
    return torch.from_numpy(words[before:]).view(dtype_of(ints))


@contextmanager
def lent_rows(
    blob: torch.Tensor, ints: list[int], first_row: int, rows: int
) -> Iterator[torch.Tensor]:
    """As `rows_of`, but what is given is void after the context.

    A whole stored weight is decoded to memory that stays for the next one, as large as the largest
    so far: to be given fresh pages takes as long as decoding. Whoever comes while that is lent,
    another thread for one, gets memory of its own.
    """
    global _lent
    whole = ints[0] == STORED and rows == ints[2]
    if not whole or not _LENDING.acquire(blocking=False):
        yield rows_of(blob, ints, first_row, rows)
        return
    try:
        if _lent.size < (nbytes := 2 * rows * ints[3]):
            _lent = np.empty(0, np.uint8)  # the old one goes before the new one comes
            _lent = np.empty(nbytes, np.uint8)
        words = decode(blob.numpy(), out=_lent[:nbytes])
        yield torch.from_numpy(words).view(dtype_of(ints)).view(rows, ints[3])
    finally:
        _LENDING.release()


def _stored_ints(header: Header, nbytes: int) -> list[int] | None:
    if header.dtype not in packed.DTYPES or len(header.shape) < 2 or not header.words:
        return None
    *rows, cols = header.shape
    return [STORED, packed.DTYPES.index(header.dtype) + 1, prod(rows), cols, nbytes]


def _stored_rows(blob: torch.Tensor, ints: list[int], first_row: int, rows: int) -> torch.Tensor:
    cols = ints[3]
    data = decode_part(blob.numpy(), first_row * cols, (first_row + rows) * cols)
    return torch.from_numpy(data).view(dtype_of(ints)).view(rows, cols)
