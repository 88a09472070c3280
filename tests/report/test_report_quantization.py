from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import pipeline
from compress.report import write_report
from compress.report.canvas import Plot
from compress.report.facts import collect_facts
from compress.report.quantization import Quantization, read_quantization
from compress.report.quantization_plots import draw_quantization
from compress.report.quantization_words import named, sentences, tile
from tests.report.conftest import SEARCHED, layers, pruning, quantization
from tests.report.test_report_page import HOSTILE, Outline


def read(*stages: dict[str, Any]) -> Quantization:
    found = read_quantization(list(stages))
    assert found
    return found


def said(stage: dict[str, Any]) -> str:
    return "\n".join(sentences(read(stage)))


def test_what_was_done() -> None:
    found = read(SEARCHED)
    assert tile(found) == (
        "Quantized layers",
        "4.25",
        "coded bits per weight, scales included",
    )
    assert sentences(found) == [
        "18 layers (0.1 M weights) quantized by ecsq (perplexity at most 1.1 times that of the "
        "model itself asked), into a compressed-tensors checkpoint; 4.25 coded bits per weight, "
        "scales included.",
        "Bits per weight by what takes them: codes 4.21, scales 0.04, zero points 0.",
        "Signal to quantization noise (SQNR) of the weights: 16.5 dB, the mean over layers; "
        "least 13 dB, model.layers.5.mlp.down_proj.",
        "Skipped: 1 layer: tied to the embeddings (1).",
        "Scales of inputs folded into 12 layers, alpha 0.5; not into 1 layer: did not run (1).",
        "Search of the least rate whose perplexity on the search text is at most 1.1 times that "
        "of the model itself: 1.093 times, found in 4 trials.",
        "Search of a step for each part of a block: KL 0.31 → 0.22 nats a token on the search "
        "text, from no differences.",
        "Left out by the search: attention of block 3.",
        "Trained: blockwise in 3 windows of blocks, cut by entropy, 9 steps. An untrained model "
        "was not measured beside it: nothing here says how much training helped.",
        "3.4 % of the codes still went to and fro in the last steps of training.",
        "The guides of the training are as the paper prints them, which harms.",
    ]


def test_what_is_not_there_is_not_told() -> None:
    stage = quantization(
        {"method": "rtn", "bits_per_weight": None, "bits": 3, "group": "row", "symmetric": False},
        skipped={},
    )
    assert len(sentences(read(stage))) == 3
    assert "quantized by rtn (3 bits, by row, asymmetric); 4.25 coded" in said(stage)
    bare = read({"stage": "quantize"})
    assert sentences(bare) == ["0 layers quantized by an unknown method."]
    assert tile(bare) == ("Quantized", "0 layers", "an unknown method")
    assert draw_quantization(bare) == {}
    nothing = read(
        quantization(
            layers={"a.0.b": {"sqnr_db": float("nan")}},
            perplexity_search={"trials": [{"bits_per_weight": 3, "ratio": float("inf")}]},
            search={"units": {}},
            training={"windows": [[0, 1]], "errors": [None], "history": [float("nan")]},
        )
    )
    assert draw_quantization(nothing) == {}
    assert read_quantization([pruning()]) is None


def test_rates_of_bitsandbytes_are_not_called_coded() -> None:
    stage = quantization({"method": "nf4"}, format="bitsandbytes")
    found = read(stage)
    assert tile(found)[2] == "bits per weight as stored, scales included"
    [(name, plot)] = draw_quantization(found).items()
    assert name == "rates"
    assert "coded" not in said(stage) + plot.title + plot.words


def test_the_unwelcome_is_said() -> None:
    metrics = SEARCHED["metrics"]
    words = said(
        quantization(
            perplexity_search=metrics["perplexity_search"] | {"ratio": 1.2},
            search=metrics["search"] | {"loss": 0.31},
        )
    )
    assert "1.2 times, found in 4 trials, which is more than was allowed." in words
    assert "from no differences; it found nothing better." in words
    assert "which harms" not in said(quantization(training={"mode": "full"}))
    assert "Trained: full. An untrained" in said(quantization(training={"mode": "full"}))


def test_reasons_come_with_their_names_the_commonest_first() -> None:
    skipped = {f"a{i}": "few" for i in range(2)} | {f"b{i}": "many" for i in range(3)}
    found = read(quantization(skipped=skipped | {"c": None}))
    assert found.skipped == {
        "many": ["b0", "b1", "b2"],
        "few": ["a0", "a1"],
        "no reason given": ["c"],
    }
    assert "Skipped: 6 layers: many (3); few (2); no reason given (1)." in sentences(found)
    assert named([str(i) for i in range(1000)]).endswith(", 199 and 800 more")
    reasons = {str(i): f"reason {i}" for i in range(9)}
    assert "reason 3 (1); 5 more reasons." in said(quantization(skipped=reasons))


def test_blocks_go_by_their_numbers_in_the_original() -> None:
    four = pruning(removed={"block": [1, 3]})
    search = {"units": {"attention": [0.5, 0.25]}, "dropped": [["mlp", 1], ["mlp", 99], ["x", 0]]}
    training = {"windows": [[0, 1], [1, 4]], "entropies": [1.0, None, 3.0], "errors": [0.1, 0.2]}
    stage = quantization(layers=layers(4), search=search, training=training)
    found = read(four, stage)
    assert sorted({layer.block for layer in found.layers if layer.block is not None}) == [
        0,
        2,
        4,
        5,
    ]
    assert found.dropped == {"mlp": [2]}
    assert found.level_search
    assert found.level_search.blocks == [0, 2]
    assert found.level_search.levels == {"attention": [0.5, 0.25], "mlp": [None, None]}
    assert found.training
    assert found.training.windows == [(0, 0), (2, 5)]
    assert found.training.entropies == [(0, 1.0), (4, 3.0)]


@pytest.mark.parametrize(
    ("training", "borders"),
    [
        ({"windows": [[0, 3], [3, 6]], "history": [1.0] * 8}, [4]),
        ({"windows": [[0, 3], [3, 6], [6, 8]], "history": [1.0] * 8}, [4]),  # the last is empty
        ({"windows": [[0, 3], [3, 6]], "history": [1.0] * 7}, []),
        ({"windows": None, "history": [1.0] * 8}, []),
        ({"windows": [[0, 3], [2, 6]], "history": [1.0] * 8}, []),  # they overlap
        ({"windows": [[0, 3], [3, 10**9]], "history": [1.0] * 8}, []),
        ({"windows": [[0, 3], [3, 3]], "history": [1.0] * 8}, []),
    ],
)
def test_where_a_window_begins(training: dict[str, Any], borders: list[int]) -> None:
    found = read(quantization(training=training)).training
    assert found
    assert found.borders == borders


def test_errors_are_behind_windows_that_were_trained() -> None:
    training = {"windows": [[0, 3], [3, 6], [6, 8]], "errors": [0.1, None]}
    found = read(quantization(training=training)).training
    assert found
    assert found.errors == [(2, 0.1)]
    training["errors"] = [0.1]
    found = read(quantization(training=training)).training
    assert found
    assert found.errors == []


def test_what_was_left_out_has_neither_rate_nor_noise() -> None:
    """The stage has zeros in its place, which have no step."""
    every = layers()
    for kind in ("q_proj", "o_proj"):
        every[f"model.layers.3.self_attn.{kind}"] = {"bits_per_weight": 0.03, "sqnr_db": 0.0}
    found = read(SEARCHED | {"metrics": SEARCHED["metrics"] | {"layers": every}})
    assert [layer.name for layer in found.layers if layer.sqnr is layer.bits is None] == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.o_proj",
    ]
    assert "least 13 dB" in "".join(sentences(found))
    [lost, *_] = [layer for layer in read(quantization(layers=every)).layers if layer.sqnr == 0]
    assert lost.bits == 0.03  # without a search nothing was left out


def test_kinds_are_named_shortly_where_that_is_clear() -> None:
    names = ["a.0.self.out", "a.0.mlp.out", "a.0.mlp.up", "a.1.mlp.up", "b.0.x", "head", "a.7777.k"]
    found = read(quantization(layers={name: {"bits_per_weight": 2} for name in names}))
    assert [(layer.kind, layer.block) for layer in found.layers] == [
        ("self.out", 0),
        ("mlp.out", 0),
        ("up", 0),
        ("up", 1),
        ("x", None),
        ("head", None),
        ("k", None),
    ]
    assert "Outside the blocks: b.0.x (2 bits), head (2 bits), a.7777.k (2 bits)." in sentences(
        found
    )


def test_each_plot_shows_what_there_is() -> None:
    plots = draw_quantization(read(SEARCHED))
    assert list(plots) == ["rates", "perplexity", "levels", "training"]
    rates, perplexity, levels, training = plots.values()
    for kind in ("q_proj", "o_proj", "down_proj"):
        assert f">{kind}<" in rates.svg[0]
    assert "coded bits per weight, scales included; SQNR" in rates.title
    assert "coded bits per weight of o_proj: 0 4.1, 1 4.15" in rates.words
    assert "SQNR, dB of down_proj: 0 18, 1 17" in rates.words
    assert ">limit 1.1<" in perplexity.svg[0]
    assert perplexity.words == "limit 1.1; 2 bits –, 3 bits 1.9, 4.25 bits 1.093, 6 bits 1.004"
    assert ">attention left out<" in levels.svg[0]
    assert "MLP left out" not in levels.svg[0]
    assert levels.words.startswith("KL 0.31 0.27 0.22; attention: 0 0.25, 1 0, 2 −0.25, 3 left out")
    assert "windows of blocks 0 to 1, 2 to 3, 4 to 5" in training.words
    assert "hidden error behind each window: 1 0.1, 3 0.2, 5 0.4" in training.words
    assert "dashed: borders of windows" in training.title


def test_many_kinds_and_steps_are_drawn_together() -> None:
    many = {
        f"m.{block}.kind{place}": {"bits_per_weight": place}
        for block in range(2)
        for place in range(10)
    }
    del many["m.1.kind0"], many["m.1.kind1"], many["m.1.kind2"]
    history = [1.0, 3.0] * 6000
    plots = draw_quantization(read(quantization(layers=many, training={"history": history})))
    assert plots["rates"].svg[0].count(">kind") == 7
    assert ">others<" in plots["rates"].svg[0]
    assert "weight of others: 0 1" in plots["rates"].words  # the mean of 0, 1 and 2
    assert plots["training"].words == "loss " + " ".join(["2"] * 60)
    assert len(plots["training"].svg[0]) < 30_000


@pytest.fixture
def all_drawn(plots: dict[str, Plot], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have every plot, though not their own."""
    every = plots | dict.fromkeys(("rates", "perplexity", "levels", "training"), plots["sizes"])
    monkeypatch.setattr("compress.report.write.draw_all", lambda facts: every)


@pytest.mark.usefixtures("all_drawn")
def test_page_and_card_tell_the_same(publish: Callable[..., Path]) -> None:
    directory = publish(stages=[SEARCHED])
    html, card, *_ = (file.read_text(errors="replace") for file in write_report(directory))
    for sentence in sentences(read(SEARCHED)):
        assert f"<li>{sentence}</li>" in html
        assert f"- {sentence}" in card.replace("\\_", "_")
    assert "<dt>tied to the embeddings</dt><dd>lm_head</dd>" in html
    assert "<dt>did not run</dt><dd>model.layers.5.mlp.down_proj</dd>" in html
    for name in ("rates", "perplexity", "levels", "training"):
        assert f"(report/{name}.png)" in card
        assert (directory / "report" / f"{name}.png").is_file()
    assert "- quantized\n" in card
    assert "- pruned\n" in card  # the search has left something out
    assert "dense weights of the codes" in html


def test_a_quantized_model(tiny_llama: Path, tmp_path: Path) -> None:
    """What the stage itself writes is understood, and scales are no weights."""
    output = tmp_path / "out"
    overrides = (
        *("calibration.sequences=2", "calibration.length=64", "stages.quantize.ignore=[lm_head]"),
        "stages.quantize.weights.bits_per_weight=4.5",
    )
    pipeline.run("ecsq.yaml", tiny_llama, output, overrides=overrides)
    facts = collect_facts(output)
    found = facts.quantization
    assert found
    assert found.bits is not None
    assert 4.3 < found.bits <= 4.5
    assert sum(found.split.values()) == pytest.approx(found.bits, abs=1e-3)
    assert found.skipped == {"ignored by the recipe": ["lm_head"]}
    assert len(found.layers) == 42
    assert {layer.kind for layer in found.layers} >= {"q_proj", "down_proj"}
    assert all(layer.block is not None and layer.bits and layer.sqnr for layer in found.layers)
    assert facts.layers == []
    measured = {row.group for row in facts.kinds if row.exponent_bits is not None}
    assert "lm_head" in measured
    assert not {group for group in measured if group.endswith("_proj")}


def hostile() -> dict[str, Any]:
    """Markup in names, values without bounds or of a wrong kind, lists without end."""
    odd = {
        f"{HOSTILE}.{i}.{HOSTILE}{i % 12}": {"bits_per_weight": 1e299, "c": 1} for i in range(1500)
    }
    return quantization(
        {"method": HOSTILE, "group": HOSTILE},
        format=HOSTILE,
        layers=odd | {"a.0.b": {"bits_per_weight": -(10**200), "sqnr_db": 5e-324}, "a.1.b": 3},
        skipped={f"{HOSTILE}{i}": f"{HOSTILE}{i % 200}" for i in range(3000)},
        fold={"skipped": {HOSTILE: HOSTILE}, "layers": -1},
        perplexity_search={
            "trials": [{"bits_per_weight": 10**i, "ratio": 10.0**-i} for i in range(290)],
            "max_ratio": -1e299,
        },
        search={
            "history": [0.0, 10**250, 5e-324] * 1000,
            "units": {"mlp": [1e299, -1e299, "x"] * 1000, "attention": 3},
            "dropped": [["mlp", i] for i in range(3000)] + [[[], {}], ["mlp"], ["mlp", "x"]],
        },
        training={
            "mode": HOSTILE,
            "partition": HOSTILE,
            "windows": [[i, i + 1] for i in range(900)],
            "entropies": [-1e299] * 3000,
            "history": [1e299, 5e-324, 10**250] * 9000,
            "errors": [0.0] * 900,
            "oscillation": 1e299,
        },
    )


@pytest.mark.usefixtures("all_drawn")
def test_nothing_in_the_stage_is_taken_for_markup(publish: Callable[..., Path]) -> None:
    html, card = (file.read_text() for file in write_report(publish(stages=[hostile()]))[:2])
    outline = Outline(html)
    assert "script" not in outline.tags
    assert "<script" not in html + card
    assert outline.text.count("{{ 7*7 }}") > 100
    assert len(html) < 3_000_000
    assert len(card) < 100_000


@pytest.mark.slow
def test_whatever_a_stage_holds_can_be_drawn() -> None:
    plots = draw_quantization(read(hostile()))
    assert list(plots) == ["rates", "perplexity", "levels", "training"]
    for each in plots.values():
        assert "<script" not in "".join(each.svg)
        assert sum(map(len, each.svg)) < 1_500_000
        assert each.png.startswith(b"\x89PNG")


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "<b>", "mlp", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["mlp", "a.0.b", "bits_per_weight", "ratio", "skipped"]), inner
        )
    ),
    max_leaves=6,
)


@given(st.sampled_from(sorted(SEARCHED["metrics"])), ODD)
def test_whatever_a_manifest_holds_can_be_read(member: str, value: Any) -> None:
    """A member of a wrong kind costs what hangs on it, not the report."""
    found = read(SEARCHED | {"metrics": SEARCHED["metrics"] | {member: value}})
    assert tile(found)
    assert sentences(found)
    assert "nan" not in re.findall(r"\w+", " ".join(sentences(found)))


@given(st.sampled_from(["perplexity_search", "fold", "search", "training"]), st.data())
def test_whatever_a_finding_holds_can_be_read(member: str, data: st.DataObject) -> None:
    finding = SEARCHED["metrics"][member]
    odd = {data.draw(st.sampled_from(sorted(finding))): data.draw(ODD)}
    assert sentences(read(SEARCHED | {"metrics": SEARCHED["metrics"] | {member: finding | odd}}))


@given(ODD, ODD)
def test_whatever_a_configuration_holds_can_be_read(config: Any, weights: Any) -> None:
    for odd in (config, {"weights": weights, "activations": weights}):
        assert sentences(read(SEARCHED | {"config": odd}))
