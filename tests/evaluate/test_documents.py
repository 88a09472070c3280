from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.evaluate.documents import (
    Documents,
    check_fits,
    check_same_tokens,
    read_documents,
)

TEXTS = ["one document", "b", "a second, longer document with more to say", "äöü 你好", "five"]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """One token a byte."""
    return checkpoint.open(tiny_llama).tokenizer()


@pytest.fixture
def with_bos(tiny_llama: Path) -> Any:
    """The same, but it begins every text with ``<s>`` as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = checkpoint.open(tiny_llama).tokenizer()
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [bos])
    return tokenizer


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def texts(documents: Documents, tokenizer: Any) -> list[str]:
    """What each document's windows say together."""
    parts = [[] for _ in range(documents.count)]
    for owner, window in documents:
        parts[owner] += window.tolist()
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in parts]


def test_every_document_is_cut_by_itself(tokenizer: Any, data: str) -> None:
    documents = read_documents(data, tokenizer, length=10)
    assert documents.owners == sorted(documents.owners)
    assert {len(window) for window in documents.windows[:-1]} <= set(range(2, 11))
    found = texts(documents, tokenizer)
    assert sorted(found) == sorted(text for text in TEXTS if text != "b")  # nothing to predict
    assert documents.tokens == sum(len(window) - 1 for window in documents.windows)
    assert all(window.dtype == torch.int64 for window in documents.windows)


def test_a_single_token_left_over_is_dropped(tokenizer: Any, data: str) -> None:
    documents = read_documents(data, tokenizer, length=11)  # "one document" is 12 tokens
    assert "one documen" in texts(documents, tokenizer)


def test_every_window_begins_with_bos_where_the_tokenizer_adds_it(with_bos: Any, data: str) -> None:
    documents = read_documents(data, with_bos, length=11)
    bos = with_bos.bos_token_id
    for window in documents.windows:
        assert window[0] == bos
        assert (window[1:] != bos).all()
        assert 2 <= len(window) <= 11
    assert sorted(texts(documents, with_bos)) == sorted(TEXTS)  # even "b" is predicted


def test_no_bos_where_the_tokenizer_has_one_but_adds_none(tokenizer: Any, data: str) -> None:
    assert tokenizer.bos_token_id is not None
    windows = read_documents(data, tokenizer).windows
    assert all((window != tokenizer.bos_token_id).all() for window in windows)


def test_the_seed_orders_and_the_limit_takes_the_first(tokenizer: Any, data: str) -> None:
    whole = texts(read_documents(data, tokenizer, seed=3), tokenizer)
    assert texts(read_documents(data, tokenizer, seed=3, limit=2), tokenizer) == whole[:2]
    assert texts(read_documents(data, tokenizer, seed=3, limit=99), tokenizer) == whole
    orders = {tuple(texts(read_documents(data, tokenizer, seed=s), tokenizer)) for s in range(9)}
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 1}, "predict nothing, got 1"), ({"limit": 0}, "got limit 0")],
)
def test_options_that_leave_nothing_are_refused(
    options: dict[str, int], message: str, tokenizer: Any, data: str
) -> None:
    with pytest.raises(BadInput, match=message):
        read_documents(data, tokenizer, **options)


def test_text_of_single_tokens_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(BadInput, match="short.txt: no document holds two tokens"):
        read_documents(str(tmp_path / "short.txt"), tokenizer)


def test_the_same_tokenizer_passes(tokenizer: Any, tiny_llama: Path) -> None:
    check_same_tokens(tokenizer, checkpoint.open(tiny_llama).tokenizer(), "here")


def test_another_vocabulary_is_refused(tokenizer: Any, tiny_llama: Path) -> None:
    other = checkpoint.open(tiny_llama).tokenizer()
    other.add_tokens(["entropy"])
    number = len(other) - 1
    with pytest.raises(
        BadInput, match=f"^here: .* differ in 1 words .* got 'entropy' as {number}, expected None"
    ):
        check_same_tokens(tokenizer, other, "here")
    with pytest.raises(BadInput, match=f"got 'entropy' as None, expected {number}"):
        check_same_tokens(other, tokenizer, "here")


def test_one_vocabulary_read_in_another_way_is_refused(tokenizer: Any, with_bos: Any) -> None:
    assert tokenizer.get_vocab() == with_bos.get_vocab()
    with pytest.raises(BadInput, match="^there: the tokenizers cut the same text differently"):
        check_same_tokens(tokenizer, with_bos, "there")


def test_what_a_model_cannot_read_is_refused() -> None:
    config = SimpleNamespace(vocab_size=10, max_position_embeddings=4)
    config.get_text_config = lambda decoder: config
    model = SimpleNamespace(config=config)

    def documents(*tokens: int) -> Documents:
        return Documents([torch.tensor([0, 1]), torch.tensor(tokens)], [0, 1], 2)

    check_fits(model, documents(0, 9, 9, 9))
    with pytest.raises(BadInput, match="^here: .*context, got 5 tokens, expected at most 4"):
        check_fits(model, documents(0, 1, 2, 3, 4), "here")
    with pytest.raises(BadInput, match="does not fit the model, got token 10, expected less"):
        check_fits(model, documents(0, 10))
