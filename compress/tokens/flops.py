"""How many floating-point operations a prompt costs, from a model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from compress.errors import BadInput
from compress.signals import find_blocks


@dataclass(frozen=True)
class PromptCost:
    """What a decoder stack does to a prompt, two operations to a multiplication and addition.

    Counted are the products with the weights of each layer (attention and MLP, gated or not, of
    experts those that a token visits), with attention's scores and values, and with the head. Not
    counted: norms, rotations, activations, softmax; the vision tower and its projector; the
    selection itself. Attention counts as the full square of the length, as implementations with a
    mask compute it, also where a causal one or a sliding window would let them skip half or more.

    ``weights``: by layer, the numbers that each token is multiplied with; ``width``: heads times
    their dimension; ``head``: the numbers of the head.
    """

    weights: tuple[int, ...]
    width: int
    head: int

    def flops(self, lengths: Sequence[int], logits: int = 0) -> int:
        """Of one sequence with ``lengths`` tokens in each layer and ``logits`` in the head."""
        if len(lengths) != len(self.weights):
            raise BadInput("one length a layer", got=len(lengths), expected=len(self.weights))
        layers = zip(self.weights, lengths, strict=True)
        return 2 * logits * self.head + sum(
            2 * n * weights + 4 * n * n * self.width for weights, n in layers
        )


def predicted_flops(
    config: Any, lengths_per_layer: Sequence[int], *, logits: int | None = None
) -> int:
    """Operations of one prompt in a model of this transformers config, as `PromptCost` counts them.

    ``lengths_per_layer``: tokens that run through each decoder layer; ``logits``: tokens that the
    head is applied to, by default all that entered the first layer; 1 in generation. Raises
    `BadInput` as `prompt_cost`, and where there are not as many lengths as layers.
    """
    cost = prompt_cost(config)
    return cost.flops(lengths_per_layer, lengths_per_layer[0] if logits is None else logits)


def prompt_cost(config: Any) -> PromptCost:
    """The `PromptCost` of the decoder that a transformers config describes; nothing is loaded.

    The layers are built without memory and their matrices counted, so grouped queries, fused and
    gated layers need no formulas of their own. Raises `BadInput` for layers that do more than
    attention and products with matrices, and for latent attention.
    """
    import torch
    from transformers import AutoModel

    config = deepcopy(config.get_text_config(decoder=True))
    if getattr(config, "kv_lora_rank", None):
        raise _uncountable(config, "latent attention")
    with torch.device("meta"):
        blocks = find_blocks(AutoModel.from_config(config, attn_implementation="eager"))
    heads = config.num_attention_heads
    each = getattr(config, "head_dim", None) or config.hidden_size // heads
    return PromptCost(
        weights=tuple(_weights(config, block) for block in blocks),
        width=heads * each,
        head=config.hidden_size * config.vocab_size,
    )


def _weights(config: Any, block: Any) -> int:
    total = 0
    visited = getattr(config, "num_experts_per_tok", None)
    for name, parameter in block.named_parameters():
        count = parameter.numel()
        if parameter.ndim == 3 and ".experts." in name and visited:
            total += count // len(parameter) * visited
        elif parameter.ndim == 2 and name.endswith(".weight"):
            total += count
        elif parameter.ndim > 2:
            raise _uncountable(config, name)
    return total


def _uncountable(config: Any, what: str) -> BadInput:
    return BadInput(
        f"the operations of {what} are not known",
        where=config.model_type,
        mend="set how many tokens to keep, or how many on average, in place of a share of FLOPs",
    )
