"""Packed weights on CUDA: unpacked, multiplied, looked up and made without leaving the device.

All functions take torch tensors of one device and launch ``kernels/*.cu`` on its current stream;
they raise `RuntimeError` where the devices differ. None but `pack` waits for the device. They work
with any `Launcher`, so tests run them on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from compress.codec.packed.api import seal
from compress.codec.packed.driver import cuda_launcher
from compress.codec.packed.layout import (
    ALIGN,
    HEADER,
    TILE_COLS,
    TILE_ROWS,
    Layout,
    check_kind,
    plan,
)
from compress.codec.packed.tables import tables
from compress.errors import Corrupt

if TYPE_CHECKING:
    import torch

MOST_ROWS = 8  # of x in `linear`
_NAMES = {"BF16": "bf16", "F16": "fp16"}
_THREADS = 128  # of a block that is no product's
_TILES = 4  # that a block of unpack_* and pack_* takes, one a warp
_COUNTED = 1 << 14  # words of a block that counts them
_RUN = 1 << 26  # words unpacked at once to be compared


class Launcher(Protocol):
    """Runs kernels of ``kernels/*.cu``: `compress.codec.packed.driver.CudaLauncher`, in tests an
    emulator of the CPU."""

    def launch(
        self, name: str, grid: int, block: int, args: Sequence[torch.Tensor | int | None]
    ) -> None:
        """Run kernel ``name`` in ``grid`` blocks of ``block`` threads, both in one dimension.

        ``args``: tensors are passed as pointers, numbers in 32 bits, None as a null pointer.
        """

    def prepare(self, name: str) -> None:
        """Compile and load kernel ``name`` if it is not yet, as a captured graph could not."""


_REGISTERED: dict[str, Launcher] = {}


@contextmanager
def register_launcher(kind: str, launcher: Launcher) -> Iterator[None]:
    """Within the context, kernels for tensors on devices of type ``kind`` go to ``launcher``."""
    before = dict(_REGISTERED)
    _REGISTERED[kind] = launcher
    try:
        yield
    finally:
        _REGISTERED.clear()
        _REGISTERED.update(before)


def launcher(device: torch.device) -> Launcher:
    """The launcher for tensors on ``device``.

    Raises `Missing` without CUDA or a driver, `BadInput` for a GPU older than Turing, `ValueError`
    for a device that is no GPU.
    """
    if device.type in _REGISTERED:
        return _REGISTERED[device.type]
    if device.type != "cuda":
        raise ValueError(f"kernels run on CUDA devices, not on {device}")
    return cuda_launcher(device.index or 0)


def prepare(device: torch.device, layout: Layout, *, products: bool) -> None:
    """Compile and load what works with weights of this layout and dtype, before it is needed.

    ``products``: `linear` too. Takes seconds where no cubin is cached. Raises as `launcher`.
    """
    names = [f"{kind}_{layout.layout}" for kind in ("unpack", "rows")]
    if products:
        name = f"linear_{layout.layout}_{_NAMES[layout.dtype]}"
        names += [f"{name}_{1 << i}" for i in range(MOST_ROWS.bit_length())]
    for name in names:
        launcher(device).prepare(name)


def unpack(
    blob: torch.Tensor, layout: Layout, first_row: int = 0, n_rows: int | None = None
) -> torch.Tensor:
    """Rows of a packed weight, (n_rows, cols) of the layout's dtype.

    ``blob``: uint8, ``layout.nbytes``, checked before. ``first_row``: a multiple of 32; ``n_rows``:
    all that follow if None.
    """
    import torch

    first, n_rows = _range(layout, first_row, n_rows)
    out = torch.empty((n_rows, layout.cols), dtype=torch_dtype(layout), device=blob.device)
    tiles = -(-n_rows // TILE_ROWS) * layout.col_tiles
    args = [*_sections(blob, layout), first, n_rows, out]
    launcher(blob.device).launch(f"unpack_{layout.layout}", -(-tiles // _TILES), _THREADS, args)
    return out


def rows(ids: torch.Tensor, blob: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The rows ``ids`` (int64, any shape) of a packed weight, (*ids.shape, cols).

    An id that is no row fails as in an embedding: at once on the CPU, at the next wait on CUDA.
    """
    import torch

    weight = _sections(blob, layout, ids)
    out = torch.empty((*ids.shape, layout.cols), dtype=torch_dtype(layout), device=blob.device)
    if n := ids.numel():
        ids = ids.long().contiguous()
        known = ((ids >= 0) & (ids < layout.rows)).all()
        torch._assert_async(known, "an id is no row of the packed weight")
        args = [*weight, ids, n, out]
        grid = -(-n * layout.col_tiles // _THREADS)
        launcher(blob.device).launch(f"rows_{layout.layout}", grid, _THREADS, args)
    return out


def linear(
    x: torch.Tensor,
    blob: torch.Tensor,
    layout: Layout,
    bias: torch.Tensor | None = None,
    first_row: int = 0,
    n_rows: int | None = None,
) -> torch.Tensor:
    """``x Wᵀ + bias`` for rows of a packed W, read as it is: (batch, n_rows) of the layout's dtype.

    ``x``: (batch, cols) of that dtype, ``batch`` 1 to `MOST_ROWS`; ``bias``: (n_rows) of it;
    ``first_row`` and ``n_rows`` as in `unpack`. Sums are fp32 and rounded once, in an order that
    depends on the shape and the GPU.
    """
    import torch

    dtype, (first, n_rows) = torch_dtype(layout), _range(layout, first_row, n_rows)
    batch = x.shape[0]
    if x.shape != (batch, layout.cols) or not 1 <= batch <= MOST_ROWS or x.dtype != dtype:
        raise ValueError(f"x must be {dtype} of 1 to {MOST_ROWS} rows of {layout.cols}")
    if bias is not None and (bias.shape != (n_rows,) or bias.dtype != dtype):
        raise ValueError(f"bias must be {dtype} of {n_rows}")
    weight = _sections(blob, layout, x, *([] if bias is None else [bias]))
    y = torch.empty((batch, n_rows), dtype=dtype, device=x.device)
    padded = 1 << (batch - 1).bit_length()
    row_tiles = -(-n_rows // TILE_ROWS)
    warps = _warps(layout.col_tiles, row_tiles, padded, _multiprocessors(x.device))
    args = [
        *weight,
        *(first, n_rows, x.contiguous(), None if bias is None else bias.contiguous(), y, batch),
    ]
    name = f"linear_{layout.layout}_{_NAMES[layout.dtype]}_{padded}"
    launcher(x.device).launch(name, row_tiles, 32 * warps, args)
    return y


def pack(
    weight: torch.Tensor, layout: str, where: str | None = None
) -> tuple[torch.Tensor, Layout]:
    """A matrix of bf16 or fp16 packed on its device: byte for byte what the CPU would make of it.

    Returns the blob, uint8, and its layout. Waits for the device. It has been unpacked again and
    compared; its checksum is taken of a copy in the host's memory. Raises `BadInput` for another
    dtype, an unknown layout, an empty matrix, or one too large.
    """
    import torch

    rows, cols = weight.shape
    kinds = {found: kind for kind, found in dtypes().items()}
    dtype = kinds.get(weight.dtype, str(weight.dtype))
    check_kind(layout, dtype, rows, cols, where)
    device, words, dense = weight.device, weight.contiguous().view(torch.int16), layout == "dense"
    launch = launcher(device).launch
    counts = torch.zeros(256, dtype=torch.int64, device=device)
    grid = min(1024, -(-words.numel() // _COUNTED))
    launch("pack_histogram", grid, 256, [words, rows, cols, int(dense), counts])
    made = tables(counts.cpu().numpy(), layout)
    code, table = (torch.from_numpy(array).to(device) for array in (made.code, made.table))
    tiles = -(-rows // TILE_ROWS) * -(-cols // TILE_COLS)
    grid = -(-tiles // _TILES)
    units = torch.empty(tiles, dtype=torch.int32, device=device)
    lengths = torch.empty(tiles * TILE_ROWS * dense, dtype=torch.uint8, device=device)
    measured = [lengths, units] if dense else [units]
    launch(f"pack_measure_{layout}", grid, _THREADS, [words, rows, cols, code, *measured])
    index = torch.nn.functional.pad(units.cumsum(0, dtype=torch.int64), (1, 0))
    planned = plan(layout, dtype, rows, cols, int(index[-1]), where)
    blob = torch.zeros(planned.nbytes, dtype=torch.uint8, device=device)
    parts = {planned.table: table, planned.index: index.int().view(torch.uint8)}
    for at, part in (parts | ({planned.extra: lengths} if dense else {})).items():
        blob[at : at + part.numel()] = part
    launch(f"pack_write_{layout}", grid, _THREADS, [*_sections(blob, planned), words, code])
    host = blob.cpu().numpy()
    seal(host, planned)
    blob[:HEADER] = torch.from_numpy(host[:HEADER]).to(device)
    strip = max(1, _RUN // (cols * TILE_ROWS)) * TILE_ROWS
    for first in range(0, rows, strip):
        part = words[first : first + strip]
        if not torch.equal(unpack(blob, planned, first, len(part)).view(torch.int16), part):
            raise Corrupt("does not unpack to what was packed: a fault of the GPU", where=where)
    return blob, planned


def dtypes() -> dict[str, torch.dtype]:
    """What torch calls the dtypes that can be packed."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16}


def torch_dtype(layout: Layout) -> torch.dtype:
    """The dtype of the weights."""
    return dtypes()[layout.dtype]


def _warps(col_tiles: int, row_tiles: int, padded: int, multiprocessors: int) -> int:
    """Of a block of linear_*: what shares out the column tiles of 32 rows.

    One a tile hides most latency, but where blocks are many anyway two of them should fit a
    multiprocessor, and more rows of x than one need the registers of 16.
    """
    crowded = row_tiles > 2 * multiprocessors
    return min(col_tiles, 16 if crowded or padded > 1 else 32)


def _multiprocessors(device: torch.device) -> int:
    import torch

    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _range(layout: Layout, first_row: int, n_rows: int | None) -> tuple[int, int]:
    """The first row tile and the number of rows."""
    n_rows = layout.rows - first_row if n_rows is None else n_rows
    if first_row % TILE_ROWS or not 0 <= first_row < first_row + n_rows <= layout.rows:
        raise ValueError(f"rows must begin at a multiple of {TILE_ROWS} and lie in the weight")
    return first_row // TILE_ROWS, n_rows


def _sections(
    blob: torch.Tensor, layout: Layout, *others: torch.Tensor
) -> list[torch.Tensor | int | None]:
    """What every kernel takes first; ``others``: tensors that it takes besides.

    A kernel that reads where it must not spoils the device for the whole process.
    """
    for other in others:
        if other.device != blob.device:
            raise RuntimeError(
                f"expected all tensors on one device, got {other.device} and, the packed weight, "
                f"{blob.device}"
            )
    if blob.data_ptr() % ALIGN:
        raise ValueError(f"a packed weight must begin at a multiple of {ALIGN} bytes")
    offsets = (layout.low, layout.codes, layout.index, layout.table, layout.extra)
    return [blob, *(offset // ALIGN for offset in offsets), layout.rows, layout.cols]
