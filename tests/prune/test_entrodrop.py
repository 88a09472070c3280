"""EntroDrop's selection of attention layers (arXiv 2504.03794), done over again from formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.prune import find_sublayers, sublayer_parts
from compress.signals import BlockTable, collect

BLOCKS, LENGTH, WRITER, SINK = 9, 80, 7, 5
TOKENS = torch.randint(97, (4, LENGTH), generator=torch.Generator().manual_seed(3))

# README of SalesforceAIResearch/EntroDrop, for Llama-3-8B: the place of each layer, not the layers.
PUBLISHED = "29_30_28_27_26_23_25_24_21_22_18_17_19_20_16_15_14_13_10_2_3_12_7_5_8_0_6_9_4_1_11_31"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The attention of one block makes a token massive, as in trained models."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:  # attention strong enough to move the entropies
            torch.nn.init.normal_(parameter, std=0.5 if "self_attn" in name else 0.2)

    def write(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, SINK] *= 1e4
        return output

    made.model.layers[WRITER].self_attn.o_proj.register_forward_hook(write)
    return made


def neighbours(x: torch.Tensor) -> float:
    n, d = x.shape
    sorted_rows = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values
    radii = sorted_rows[:, 25]  # the nearest is the token itself
    volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return d * (radii + 1e-10).log().mean().item() + volume + math.log(n) - math.log(25)


def buckets(x: torch.Tensor) -> float:
    total = 0.0
    for feature in x.T:
        shares = torch.histc(feature, 20, feature.min().item(), feature.max().item()) / len(x)
        total -= sum(share * math.log(share) for share in shares.tolist() if share)
    return total


def renyi(x: torch.Tensor) -> float:
    scores = (x - x.mean(0)) / x.std(0)
    distances = torch.cdist(scores, scores, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = torch.exp(-(distances**2) / (2 * distances.median() ** 2))
    return 1 / (1 - 4) * math.log((kernel ** (4 - 1)).mean().item())


LITERAL: dict[str, Callable[[torch.Tensor], float]] = {
    "entrodrop_knn": neighbours,
    "entrodrop_bucket": buckets,
    "entrodrop_renyi": renyi,
}
# Of the scores' roundings; a token on the edge of a bucket may fall on either side.
TOLERANCE = {"entrodrop_knn": 1e-5, "entrodrop_bucket": 0.01, "entrodrop_renyi": 1e-7}


@pytest.fixture(scope="module")
def streams(model: LlamaForCausalLM) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """By layer and sequence, X and X + Attn(norm X), in float64."""
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(BLOCKS)]
    hooks = []
    for row, layer in zip(found, model.model.layers, strict=True):
        inputs: list[torch.Tensor] = []

        def enter(module: Any, args: Any, inputs: Any = inputs) -> None:
            inputs.append(args[0][0].clone())

        def leave(module: Any, args: Any, out: Any, row: Any = row, inputs: Any = inputs) -> None:
            row.append((inputs[-1].double(), (inputs[-1] + out[0][0]).double()))

        hooks.append(layer.register_forward_pre_hook(enter))
        hooks.append(layer.self_attn.register_forward_hook(leave))
    with torch.no_grad():
        for tokens in TOKENS:
            model(tokens[None])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("scorer", LITERAL)
def test_the_scores_and_the_ranking_are_entrodrops(
    scorer: str,
    model: LlamaForCausalLM,
    streams: list[list[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    entropy = LITERAL[scorer]
    norms = [sum(entropy(y) - entropy(x) for x, y in row) / len(TOKENS) for row in streams]
    parts = sublayer_parts(model, find_sublayers(model), "attention")
    table = collect(model, TOKENS, parts=parts, scorers=[scorer])
    assert table.means(scorer) == pytest.approx(norms, rel=1e-5, abs=TOLERANCE[scorer])
    norms[0] = norms[1] = norms[-1] = math.inf
    ranking = sorted(range(BLOCKS), key=lambda layer: norms[layer])
    assert table.order(scorer) == ranking[:-3]
    assert set(ranking[-3:]) == {0, 1, BLOCKS - 1}


def test_ours_spare_the_sink_that_entrodrop_removes_first(model: LlamaForCausalLM) -> None:
    scorers = ["entrodrop_bucket", "bucket_entropy"]
    parts = sublayer_parts(model, find_sublayers(model), "attention")
    table = collect(model, TOKENS, parts=parts, scorers=scorers)
    assert table.writes_sink(WRITER)
    assert [table.order(scorer).index(WRITER) for scorer in scorers] == [0, BLOCKS - 4]
    found = table.stability("entrodrop_bucket")
    assert found is not None
    assert found.ranks[WRITER] == (1, 1)


def test_an_order_is_of_layers_where_the_published_one_is_of_places() -> None:
    places = [int(place) for place in PUBLISHED.split("_")]
    table = BlockTable({"entrodrop_knn": [[float(place)] for place in places]}, [[0]] * 32)
    order = table.order("entrodrop_knn")
    assert order[:16] == [25, 29, 19, 20, 28, 23, 26, 22, 24, 27, 18, 30, 21, 17, 16, 15]
    whole = [*order, 0, 1, 31]
    assert [whole.index(layer) for layer in range(32)] == places
