from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.signals import text

SPLITS = ("builtin:calibration", "builtin:heldout")


class Characters:
    """A tokenizer of one token a character that would add a special token if it were let."""

    def __call__(
        self, document: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Any:
        return {"input_ids": [0] * add_special_tokens + [ord(character) for character in document]}


def decode(window: torch.Tensor) -> str:
    return "".join(map(chr, window.tolist()))


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def shingles(documents: list[str], size: int) -> set[tuple[str, ...]]:
    words = " ".join(documents).split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size)}


def test_the_builtin_splits_share_no_passage() -> None:
    calibration, heldout = map(text.load_text, SPLITS)
    paragraphs = [
        {" ".join(p.split()) for document in split for p in document.split("\n\n")}
        for split in (calibration, heldout)
    ]
    assert not paragraphs[0] & paragraphs[1]
    shared = shingles(calibration, 13) & shingles(heldout, 13)
    assert len(shared) < 0.005 * len(shingles(heldout, 13))


def test_the_builtin_text_is_split_seventy_to_thirty_and_is_never_repeated() -> None:
    calibration, heldout = (sum(map(len, text.load_text(split))) for split in SPLITS)
    assert calibration + heldout > 250_000
    assert 0.25 < heldout / (calibration + heldout) < 0.35
    for split in SPLITS:
        documents = text.load_text(split)
        assert len(documents) == len(set(documents))
        assert text.load_text(split) == documents


def test_an_unknown_split_gets_a_hint() -> None:
    with pytest.raises(BadInput, match="did you mean 'builtin:calibration'"):
        text.load_text("builtin:calib")


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "a", "content": "b"}, "a"),
        ({"content": "b", "page": "c"}, "b"),
        ({"page": "c", "question": "d", "answer": "e"}, "c"),
        ({"question": "d", "answer": "e"}, "d\ne"),
        ({"text": None, "content": "a\u2028b"}, "a\u2028b"),
        ({"text": "\ud800"}, "?"),
    ],
)
def test_jsonl_fields(tmp_path: Path, record: Any, document: str) -> None:
    assert text.load_text(write(tmp_path / "a.jsonl", record)) == [document]


def test_jsonl_skips_blank_lines_and_empty_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a"}\r\n\n{"text": " "}\n{"text": "b"}', encoding="utf-8")
    assert text.load_text(str(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('{"title": "a"}', "line 2: no text"),
        ('{"question": "a"}', "line 2: no text"),
        ('{"text": 1}', "line 2: no text"),
        ('["text"]', "line 2: no text"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(BadInput, match=message):
        text.load_text(str(path))


@given(st.lists(st.text(string.ascii_letters + " ", min_size=1, max_size=3000), max_size=12))
@settings(max_examples=50, deadline=None)
def test_txt_blocks_are_the_text_in_order(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]
) -> None:
    path = tmp_path_factory.mktemp("txt") / "a.TXT"
    path.write_text("\n\n".join(["x", *paragraphs]))
    kept = [paragraph for paragraph in ["x", *paragraphs] if paragraph.strip()]
    documents = text.load_text(str(path))
    assert "\n\n".join(documents).split() == " ".join(kept).split()
    assert all(len(document) < 4000 + 3002 for document in documents)
    assert all(len(document) >= 4000 - 100 for document in documents[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b"\n \n\n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("latin1.txt", b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        ("table.csv", b"a,b", r"expected \.txt or \.jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        text.load_text(str(path))
    assert name in str(caught.value)


def test_a_directory_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a directory"):
        text.load_text(str(tmp_path))


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """26 documents of ten equal letters each; 12 tokens a document with its separator."""
    records = [{"text": letter * 10} for letter in string.ascii_lowercase]
    return write(tmp_path / "letters.jsonl", *records)


def test_windows_cut_the_stream_without_overlap(letters: str) -> None:
    cut = text.windows(letters, Characters(), 26, 12, 0)
    assert cut.dtype == torch.int64
    assert cut.shape == (26, 12)
    assert sorted(map(decode, cut)) == [letter * 10 + "\n\n" for letter in string.ascii_lowercase]
    longer = text.windows(letters, Characters(), 8, 39, 0)
    assert decode(longer.flatten()) == decode(cut.flatten())


def test_the_seed_decides_the_order(letters: str) -> None:
    cut = [text.windows(letters, Characters(), 20, 12, seed) for seed in (0, 0, 1)]
    assert torch.equal(cut[0], cut[1])
    assert not torch.equal(cut[0], cut[2])


def test_fewer_windows_are_a_prefix_of_more(letters: str) -> None:
    many, few = (text.windows(letters, Characters(), n, 12, 3) for n in (20, 5))
    assert torch.equal(many[:5], few)


def test_too_short_a_text_says_how_many_windows_there_are(letters: str) -> None:
    with pytest.raises(BadInput, match=r"got 26 windows.*lower sequences or length") as caught:
        text.windows(letters, Characters(), 27, 12, 0)
    assert "--data" in str(caught.value)


def test_a_real_tokenizer_warns_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"the": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8)
    cut = text.windows("builtin:heldout", tokenizer, 4, 32, 0)
    assert cut.unique().tolist() == [0, 1]
    assert not "".join(capfd.readouterr())
