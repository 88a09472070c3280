"""Chat templates of models that see: some take a message as text, some as a list of its parts."""

from __future__ import annotations

from typing import Any

IMAGE = "<image>"  # lm-eval's sign for where an image is shown
_PROBE = "entropress"


def as_template_wants(
    tokenizer: Any, history: list[dict[str, Any]], *, images: bool
) -> list[dict[str, Any]]:
    """The same messages, with text and images apart where the tokenizer's template reads parts.

    It is given parts of a message with images, where `IMAGE` stands for ``images``, if it can read
    them, and of one of text if it cannot read text: it would leave that out without a word.
    """
    text, parts = (_reads(tokenizer, content) for content in (_PROBE, _parts(_PROBE, images)))
    return [
        {**message, "content": _parts(message["content"], images)}
        if parts and ((images and IMAGE in message["content"]) or not text)
        else message
        for message in history
    ]


def _reads(tokenizer: Any, content: Any) -> bool:
    """Whether what a user says comes out of the template, and not as Python writes it."""
    try:
        said = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # templates are programs, and raise anything
        return False
    return _PROBE in said and repr(_PROBE) not in said


def _parts(text: str, images: bool) -> list[dict[str, str]]:
    """``"a <image> b"`` as text, image, text."""
    found: list[dict[str, str]] = []
    for piece in text.split(IMAGE) if images else [text]:
        found += [{"type": "text", "text": piece}, {"type": "image"}]
    return [part for part in found[:-1] if part.get("text") != ""]
