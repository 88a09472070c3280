"""Weights that stay compressed in memory (docs/PACKED.md): made, checked and unpacked on the CPU.

`pack`, `unpack` and `check` are for everybody; `tables`, `plan` and `seal` are the steps between
which another processor may do the work and still end with the same bytes.
"""

from __future__ import annotations

from compress.codec.packed import cuda
from compress.codec.packed.api import check, pack, seal, unpack
from compress.codec.packed.choice import choose
from compress.codec.packed.layout import DTYPES, HEADER, LAYOUTS, TILE_ROWS, Layout, parse, plan
from compress.codec.packed.nvrtc import compiler
from compress.codec.packed.selftest import SelfTest, self_test
from compress.codec.packed.tables import Tables, tables

__all__ = [
    "DTYPES",
    "HEADER",
    "LAYOUTS",
    "TILE_ROWS",
    "Layout",
    "SelfTest",
    "Tables",
    "check",
    "choose",
    "compiler",
    "cuda",
    "pack",
    "parse",
    "plan",
    "seal",
    "self_test",
    "tables",
    "unpack",
]
