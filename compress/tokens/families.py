"""Which models the engine knows, and where an unmodified transformers model keeps what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, did_you_mean
from compress.signals import find_blocks
from compress.tokens.attention import projections
from compress.tokens.policy import TokenPolicy

if TYPE_CHECKING:
    import torch

# Placeholders for visual tokens stand among the ids, and all tokens pass the text stack's layers.
# In LLaVA-NeXT and LLaVA-OneVision the embeddings of line ends count as tokens of their image.
VISUAL = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
)
TEXT = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)
_STACKS_OF_VISUAL = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
_ATTENTION = ("self_attn", "attention", "attn")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_CROSS = ("mllama", "flamingo", "idefics")


@dataclass(frozen=True, eq=False)
class Family:
    """A model as the engine sees it.

    ``root`` is given the ids, ``decoder`` is the text model in it (they may be the same), with its
    ``config`` and ``layers``. Tokens go before layer ``layer``. ``visual_ids``: what stands for
    visual tokens; ``window``: of its sliding-window layers, if there are such.
    """

    root: Any
    decoder: Any
    config: Any
    layers: tuple[Any, ...]
    layer: int
    visual_ids: tuple[int, ...]
    window: int | None
    notes: tuple[str, ...]


def find_family(model: Any, policy: TokenPolicy) -> Family:
    """Where ``model`` keeps its parts. Raises `BadInput`, with the reason, where it has no place.

    Qwen3-VL adds features of the images (DeepStack) after its first layers to all visual tokens:
    they can go only after those, which is noted.
    """
    where = type(model).__name__
    _check_eager(model)
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput("an encoder-decoder is not pruned: its encoder sees all tokens", where=where)
    known, kind = (VISUAL, "visual") if policy.target == "visual" else (TEXT, "text")
    if config.model_type in (TEXT if policy.target == "visual" else VISUAL):
        raise BadInput(
            f"this model has no {kind} tokens to prune"
            if kind == "visual"
            else "prompts are pruned in models of text alone",
            where=where,
            got=f"target '{policy.target}' for model type {config.model_type}",
            mend="set target to 'text'" if kind == "visual" else "set target to 'visual'",
        )
    if config.model_type not in known:
        raise _unknown(model, known)
    decoder = model.get_decoder()
    text = decoder.config.get_text_config(decoder=True)
    if text.model_type not in (*TEXT, *_STACKS_OF_VISUAL):
        raise BadInput(
            "unknown text stack",
            where=where,
            got=text.model_type,
            expected=", ".join((*TEXT, *_STACKS_OF_VISUAL)),
        )
    layers = tuple(find_blocks(decoder))
    layer, notes = policy.layer, []
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    if deepstack and layer < len(deepstack):
        layer = len(deepstack)
        notes = [f"layer {policy.layer} became {layer}: DeepStack adds to visual tokens till there"]
    if layer >= len(layers):
        raise BadInput(
            "there is no such layer to prune before",
            where=where,
            got=f"layer {layer}",
            expected=f"1 to {len(layers) - 1}",
        )
    if find_attention(layers[layer - 1]) is None:
        raise BadInput(
            "no attention to take queries from: it was removed",
            where=f"{where}, layer {layer - 1}",
            mend=f"choose another layer than {layer}",
        )
    return Family(
        root=model.base_model,
        decoder=decoder,
        config=text,
        layers=layers,
        layer=layer,
        visual_ids=visual_ids(config) if kind == "visual" else (),
        window=_window(text, where),
        notes=tuple(notes),
    )


def visual_ids(config: Any) -> tuple[int, ...]:
    """The ids that stand for parts of images and videos; none where the model knows neither."""
    found = {getattr(config, name, None) for name in _PLACEHOLDERS}
    return tuple(sorted(token for token in found if token is not None))


def find_attention(layer: torch.nn.Module) -> Any:
    """A decoder layer's attention, if it has one that makes queries and keys of its own."""
    found = (getattr(layer, name, None) for name in _ATTENTION)
    return next((module for module in found if module is not None and projections(module)), None)


def _check_eager(model: Any) -> None:
    """Refuse compiled models, whose graphs do not run hooks that change shapes."""
    compiled = hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
    if compiled:
        raise BadInput(
            "a compiled model is not pruned: hooks change shapes inside of it",
            where=type(model).__name__,
            mend="give the model as it was before torch.compile",
        )


def _unknown(model: Any, known: tuple[str, ...]) -> BadInput:
    """Why a model of another type is refused."""
    where, got = type(model).__name__, model.config.model_type
    if got in _CROSS:
        what = "it reads images by cross-attention: they are no tokens of the sequence"
        return BadInput(what, where=where, got=f"model type {got}")
    try:
        layers = list(find_blocks(model.get_decoder()))
    except (AttributeError, BadInput):
        layers = []
    if any(find_attention(layer) is None for layer in layers):
        what = "not all of its layers have attention: the others remember all tokens in one state"
        return BadInput(what, where=where, got=f"model type {got}")
    expected = ", ".join(known)
    mend = did_you_mean(got, known)
    return BadInput(
        "unknown family",
        where=where,
        got=f"model type {got}",
        expected=expected,
        mend=mend if mend and mend.startswith("did") else None,
    )


def _window(text: Any, where: str) -> int | None:
    """The window of the sliding layers. Raises `BadInput` for layers of any other kind."""
    types = getattr(text, "layer_types", None)
    window: int | None = getattr(text, "sliding_window", None)
    if types is None:
        return window
    if strange := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise BadInput("layers of this type are not pruned", where=where, got=", ".join(strange))
    return window if "sliding_attention" in types else None
