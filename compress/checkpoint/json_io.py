"""JSON in and out: one canonical form for writing, one strict parser for reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import BadInput, Corrupt


def dump_json(document: Any) -> bytes:
    """Canonical JSON: UTF-8, keys sorted, two-space indent, one final line feed."""
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False)
    return (text + "\n").encode()


def parse_json(data: bytes, where: object) -> Any:
    """The document in ``data``; `Corrupt` on anything but UTF-8 JSON with distinct keys."""
    try:
        document = json.loads(data.decode(), object_pairs_hook=_distinct)
        if b"\\ud" in data.lower():
            # An escaped lone surrogate parses but has no UTF-8 form: no name may hold one.
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise Corrupt("not valid JSON: nested too deeply", where=where) from None
    except ValueError as error:
        raise Corrupt(f"not valid JSON: {error}", where=where) from None
    return document


def load_json(path: Path) -> Any:
    """`parse_json` of a file; `BadInput` where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=path) from None
    return parse_json(data, path)


def load_object(path: Path) -> dict[str, Any]:
    """`load_json` of a file that must hold a JSON object."""
    document = load_json(path)
    if not isinstance(document, dict):
        raise Corrupt("not a JSON object", where=path)
    return document


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a key occurs twice")
    return members
