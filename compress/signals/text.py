"""Text for calibration and for measuring: documents, and windows of tokens cut from them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, Missing, did_you_mean

if TYPE_CHECKING:
    import torch

_SPLITS = ("builtin:calibration", "builtin:heldout")
_HELDOUT_SHARE = 0.3
_BLOCK_CHARACTERS = 4000
_SEPARATOR = "\n\n"
_FIELDS = (("text",), ("content",), ("page",), ("question", "answer"))


def load_text(data: str) -> list[str]:
    """The documents of ``builtin:calibration``, ``builtin:heldout`` or a file.

    The built-in text is the English language reference that comes with Python (`pydoc_data`); it
    differs a little between Python versions. The two splits share no topic and no paragraph.

    A ``.txt`` file is cut at blank lines into blocks of about 4000 characters. Each line of a
    ``.jsonl`` file is an object whose ``text``, ``content`` or ``page`` is a document, or else its
    ``question`` and ``answer`` together. All files are UTF-8. Raises `BadInput` for a file that is
    not so or holds no text.
    """
    if data.startswith("builtin:"):
        return _builtin(data)
    path = Path(data)
    if not path.is_file():
        raise BadInput("is a directory" if path.is_dir() else "no such file", where=data)
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise BadInput("unknown kind of text", where=data, got=kind, expected=".txt or .jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=data) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 (byte {error.start})", where=data) from None
    documents = _blocks(text) if kind == ".txt" else _records(text, data)
    if not documents:
        raise BadInput("holds no text", where=data)
    return documents


def windows(data: str, tokenizer: Any, sequences: int, length: int, seed: int) -> torch.Tensor:
    """``sequences`` windows of ``length`` tokens that do not overlap: int64 [sequences, length].

    The documents of `load_text`, shuffled by ``seed``, are tokenized into one stream without
    special tokens and the stream is cut, so every window is full and nothing is padded. Equal
    arguments give equal windows. Raises `BadInput` where the text is too short.
    """
    import torch

    documents = load_text(data)
    random.Random(seed).shuffle(documents)
    stream = list(islice(_tokens(documents, tokenizer), sequences * length))
    if len(stream) < sequences * length:
        raise BadInput(
            f"the text is too short for {sequences} windows of {length} tokens",
            where=data,
            got=f"{len(stream) // length} windows ({len(stream)} tokens)",
            mend="lower sequences or length, or give a longer text with --data",
        )
    return torch.tensor(stream, dtype=torch.int64).view(sequences, length)


def _tokens(documents: Iterable[str], tokenizer: Any) -> Iterator[int]:
    for document in documents:
        # verbose=False: a document longer than the model's context is no mistake here.
        encoded = tokenizer(document + _SEPARATOR, add_special_tokens=False, verbose=False)
        yield from encoded["input_ids"]


def _builtin(data: str) -> list[str]:
    if data not in _SPLITS:
        raise BadInput(f"unknown text '{data}'", mend=did_you_mean(data, _SPLITS))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise Missing(
            "this Python comes without pydoc_data",
            where=data,
            mend="give a text with --data, or install Python's standard library in full",
        ) from None
    texts = _without_repeats(topics)
    heldout = _heldout_topics(texts)
    return [
        block
        for topic, text in texts.items()
        if (topic in heldout) == (data == "builtin:heldout")
        for block in _blocks(text)
    ]


def _without_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    """The topics, longest first, each without the paragraphs an earlier one has.

    The topics quote each other at length ("if" is a section of "compound"): split as they are,
    the held-out text would hold a part of the calibration text.
    """
    seen: set[str] = set()
    texts = {}
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        kept = []
        for paragraph in _paragraphs(topics[topic]):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                kept.append(paragraph)
        if kept:
            texts[topic] = _SEPARATOR.join(kept)
    return texts


def _heldout_topics(texts: Mapping[str, str]) -> set[str]:
    """Topics of about 30 % of the characters: longest first, whenever the share falls behind."""
    heldout: set[str] = set()
    total = share = 0
    for topic in sorted(texts, key=lambda topic: (-len(texts[topic]), topic)):
        total += len(texts[topic])
        if share + len(texts[topic]) <= _HELDOUT_SHARE * total:
            share += len(texts[topic])
            heldout.add(topic)
    return heldout


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _blocks(text: str) -> list[str]:
    """The text as runs of whole paragraphs of about `_BLOCK_CHARACTERS` characters each."""
    blocks: list[list[str]] = []
    room = 0
    for paragraph in _paragraphs(text):
        if room <= 0:
            blocks.append([])
            room = _BLOCK_CHARACTERS
        blocks[-1].append(paragraph)
        room -= len(paragraph)
    return [_SEPARATOR.join(block) for block in blocks]


def _records(text: str, where: str) -> list[str]:
    """The documents of a ``.jsonl`` file, empty ones left out."""
    # Not splitlines(), which also cuts at U+2028 and others that JSON strings may hold.
    lines = enumerate(text.split("\n"), 1)
    documents = [_document(line, f"{where}, line {n}") for n, line in lines if line.strip()]
    return [document for document in documents if document.strip()]


def _document(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not valid JSON: {error}", where=where) from None
    for fields in _FIELDS:
        if isinstance(record, dict) and all(isinstance(record.get(name), str) for name in fields):
            # A lone surrogate ("\\ud800") is valid JSON, but tokenizers take UTF-8 only.
            text = "\n".join(record[name] for name in fields)
            return text.encode(errors="replace").decode()
    raise BadInput(
        "no text in the record",
        where=where,
        expected='an object with "text", "content", "page", or "question" and "answer"',
    )
