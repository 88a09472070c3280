"""The format stands still: files written once are decoded, and written again, to the same bytes.

``golden/v1/NAME.coded`` is a coded tensor of that name, ``golden/v1/sha256`` lists the digests of
the decoded bytes. ``golden/make.py`` made them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from compress import codec

DIRECTORY = Path(__file__).parent / "golden" / "v1"
LINES = (DIRECTORY / "sha256").read_text().splitlines()
SHA256 = {name: digest for digest, name in (line.split() for line in LINES)}


def test_every_file_is_listed():
    assert {path.stem for path in DIRECTORY.glob("*.coded")} == set(SHA256)


@pytest.mark.parametrize("name", SHA256)
def test_golden_file(backend, name):
    blob = (DIRECTORY / f"{name}.coded").read_bytes()
    data = codec.decode(blob, name)
    assert hashlib.sha256(data).hexdigest() == SHA256[name]
    header = codec.read_header(blob, name)
    if header.block_log2 == 16:
        assert b"".join(codec.encode(name, header.dtype, header.shape, [data])) == blob
        assert codec.predict(header.dtype, [data], header.shape) == len(blob)


def test_the_golden_files_cover_the_corners():
    headers = {
        name: codec.read_header((DIRECTORY / f"{name}.coded").read_bytes()) for name in SHA256
    }
    assert {(header.width, header.rotate) for header in headers.values()} == {
        *((1, 0), (2, 0), (2, 1), (4, 1), (8, 0), (8, 1))
    }
    assert (DIRECTORY / "fail_closed.coded").stat().st_size == 83
    assert headers["fail_closed"].shape == (82,)
