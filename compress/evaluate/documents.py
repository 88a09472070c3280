"""Documents as windows of tokens: what two models are read side by side on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.signals import load_text

if TYPE_CHECKING:
    import torch

LENGTH = 512
_PROBES = (
    "The quick brown fox, it's 3.14159 o'clock!  \t\n\n  def f(x):\n        return x\r\n",
    "Ünïcödé Привет 你好，世界 こんにちは مرحبا नमस्ते 🤖👩‍👩‍👧 \u200b\ufeff e\u0301 ½ ²",
    "<s> </s> <|endoftext|> <pad> http://example.org/?a=1&b=%20 1234567890 AAAAAAAA",
)


@dataclass(frozen=True)
class Documents:
    """Tokenized documents cut into windows.

    ``windows``: int64 [at most `read_documents`' length, at least 2] each, those of one document
    one after another; ``owners``: for each the index of its document; ``count``: of documents, all
    of which have a window.
    """

    windows: list[torch.Tensor]
    owners: list[int]
    count: int

    @property
    def tokens(self) -> int:
        """How many tokens are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in self.windows)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each window with the index of its document."""
        return zip(self.owners, self.windows, strict=True)


def read_documents(
    data: str, tokenizer: Any, *, length: int = LENGTH, limit: int | None = None, seed: int = 0
) -> Documents:
    """The documents of `compress.signals.load_text`, shuffled by ``seed``, at most ``limit``.

    Each document is tokenized by itself and cut into windows of ``length`` tokens, the last one
    shorter. Where the tokenizer of its own accord begins a text with its BOS token, so does every
    window. A document too short to have one predicted token is left out. Equal arguments give equal
    windows. Raises `BadInput` for a ``length`` or ``limit`` that leaves nothing, for text that no
    tokens come from, and as `load_text` does.
    """
    import torch

    if length < 2:
        raise BadInput("windows of this length predict nothing", got=length, expected="2 or more")
    if limit is not None and limit < 1:
        raise BadInput("no documents are asked for", got=f"limit {limit}", expected="1 or more")
    texts = load_text(data)
    random.Random(seed).shuffle(texts)
    start = _start(tokenizer)
    windows: list[torch.Tensor] = []
    owners: list[int] = []
    count = 0
    for text in texts:
        if count == limit:
            break
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        step = length - len(start)
        pieces = (start + tokens[at : at + step] for at in range(0, len(tokens), step))
        kept = [torch.tensor(piece, dtype=torch.int64) for piece in pieces if len(piece) > 1]
        windows += kept
        owners += [count] * len(kept)
        count += bool(kept)
    if not count:
        raise BadInput("no document holds two tokens", where=data)
    return Documents(windows, owners, count)


def check_same_tokens(reference_tokenizer: Any, tokenizer: Any, where: object) -> None:
    """Raise `BadInput` unless both tokenizers read text as the same tokens.

    Compared are the vocabularies and the tokens of a few texts of many scripts, with the special
    tokens that each adds. ``where``: the candidate, for the message.
    """
    theirs, ours = reference_tokenizer.get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        differing = {word for word, _ in theirs.items() ^ ours.items()}
        word = min(differing)
        raise BadInput(
            f"the tokenizers differ in {len(differing)} words of their vocabularies",
            where=where,
            got=f"{word!r} as {ours.get(word)}",
            expected=f"{theirs.get(word)} as the reference",
        )
    for probe in _PROBES:
        expected, got = reference_tokenizer(probe)["input_ids"], tokenizer(probe)["input_ids"]
        if got != expected:
            raise BadInput(
                f"the tokenizers cut the same text differently ({probe[:20]!r})",
                where=where,
                got=f"{len(got)} tokens {got[:4]}…",
                expected=f"{len(expected)} tokens {expected[:4]}… as the reference",
            )


def check_causal(checkpoint: Checkpoint) -> None:
    """Raise `BadInput` unless transformers knows the model as one that predicts the next token."""
    from transformers.models.auto import modeling_auto as known

    causal = {
        *known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    classes = checkpoint.config.get("architectures") or ["no architecture"]
    if classes[0] not in causal or checkpoint.config.get("is_encoder_decoder"):
        raise BadInput(
            "no causal language model",
            where=checkpoint.path,
            got=classes[0],
            expected="one that predicts the next token, such as LlamaForCausalLM",
        )


def check_fits(model: Any, documents: Documents, where: object = None) -> None:
    """Raise `BadInput` where a model cannot read ``documents``, by its config."""
    config = model.config.get_text_config(decoder=True)
    longest = max(map(len, documents.windows))
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise BadInput(
            "the windows are longer than the model's context",
            where=where,
            got=f"{longest} tokens",
            expected=f"at most {most}",
            mend="lower length",
        )
    largest = max(int(window.max()) for window in documents.windows)
    if largest >= config.vocab_size:
        raise BadInput(
            "the tokenizer does not fit the model",
            where=where,
            got=f"token {largest}",
            expected=f"less than vocab_size {config.vocab_size}",
        )


def _start(tokenizer: Any) -> list[int]:
    """The BOS token, if the tokenizer begins texts with it when nobody asks it to."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
