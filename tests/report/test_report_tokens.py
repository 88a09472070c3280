from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import pipeline
from compress import recipe as recipes
from compress.report import write_report
from compress.report.canvas import Plot
from compress.report.facts import collect_facts
from compress.report.tokens import TokenPruning, read_token_pruning
from compress.report.tokens_plots import draw_token_pruning
from compress.report.tokens_words import sentences, tile
from tests.report.conftest import LM_EVAL, PERPLEXITY, pruning, token_pruning
from tests.report.test_report_overlay import BAD, GOOD, entry
from tests.report.test_report_page import HOSTILE, Outline
from tests.report.test_report_quantization import ODD

STAGE = token_pruning()


def read(*stages: dict[str, Any]) -> TokenPruning:
    found = read_token_pruning(list(stages))
    assert found
    return found


def said(stage: dict[str, Any], *before: dict[str, Any]) -> str:
    return "\n".join(sentences(read(*before, stage)))


def policy(**others: Any) -> dict[str, Any]:
    return STAGE["metrics"]["policy"] | others


def test_what_was_done() -> None:
    found = read(STAGE)
    assert tile(found) == ("Visual tokens kept", "25 %", "from layer 3 on, by logdet")
    assert sentences(found) == [
        "25 % of the visual tokens of each image (an input had 256 on average) stay from layer 3 "
        "on, chosen by logdet.",
        "A prompt then takes 41.23 % of the floating-point operations of a whole one, as counted "
        "from the sizes of the layers.",
        "It is this layer before which the entropy of the tokens collapses. Layers are counted "
        "from 0.",
        "On inputs that the choice has not seen, they lose 0.18 [0.11, 0.26] nats a token less "
        "than random tokens do, the mean and its 95 % interval.",
        "Loss by selector, on half of the 64 inputs, the KL from the whole prompt in nats a token: "
        "logdet 0.12, divprune 0.14, random 0.31, fastv 0.52.",
        "Worse than random tokens on them: fastv.",
    ]


def test_what_is_kept_may_be_a_number_and_of_a_text() -> None:
    stage = token_pruning(policy=policy(keep=64, target="text", recent=8), tokens=None)
    assert tile(read(stage))[:2] == ("Text tokens kept", "64")
    assert said(stage).startswith(
        "64 of the tokens of a prompt, but for its first 4 and last 8, stay from layer 3 on"
    )
    assert tile(read(token_pruning(policy=policy(keep=1))))[1] == "1"
    assert tile(read(token_pruning(policy=policy(keep=1.0))))[1] == "100 %"


@pytest.mark.parametrize(
    ("layer", "collapse", "expected"),
    [
        ("auto", None, "collapses before no layer, as in many models: layer 3 is only the default"),
        (3, None, "before no layer, as in many models: layer 3 is the one that the recipe names"),
        (3, 3, "It is this layer before which"),
        (3, 2, "collapses before layer 2; the recipe names layer 3"),
        ("auto", 2, "collapses before layer 2; the model lets tokens go before layer 3"),
    ],
)
def test_why_this_layer(layer: Any, collapse: int | None, expected: str) -> None:
    assert expected in said(token_pruning({"layer": layer}, collapse_layer=collapse))


def test_too_few_layers_tell_of_no_collapse() -> None:
    words = said(token_pruning(collapse_layer=None, entropies=[0.5, 0.4, 0.3]))
    assert "Layers are counted from 0; layer 3 is only the default." in words
    assert "collapse" not in words


def test_layers_that_went_before_are_not_counted() -> None:
    assert "counted from 0, without the block that had been removed before." in said(
        STAGE, pruning()
    )
    two = pruning(removed={"block": [1, 3]})
    assert "without the blocks that had been" in said(STAGE, two)
    assert "without" not in "\n".join(sentences(read(STAGE, two)))


def test_the_last_policy_is_the_one() -> None:
    assert read(STAGE, token_pruning(policy=policy(keep=0.5))).keep == 0.5
    assert read_token_pruning([pruning()]) is None


def test_what_may_be_chance_is_said_to_be() -> None:
    less = {"estimate": 0.02, "low": -0.01, "high": 0.05}
    words = said(token_pruning({"insist": True}, less_than_random=less))
    assert "0.02 [−0.01, 0.05] nats a token less" in words
    assert "95 % interval: that may be chance; the recipe insists on it." in words
    assert "that may be chance.\n" in said(token_pruning(less_than_random=less))
    assert "that may be chance" in said(token_pruning(less_than_random=less | {"low": None}))
    assert "Worse" not in said(token_pruning(losses={"random": 0.1, "logdet": 0.1}))
    assert "Worse" not in said(token_pruning(losses={"fastv": 0.1}))


def test_what_is_not_there_is_not_told() -> None:
    bare = read({"stage": "prune_tokens"})
    assert sentences(bare) == [
        "– of the tokens stay from layer – on, chosen by an unknown selector.",
        "Layers are counted from 0; layer – is only the default.",
    ]
    assert tile(bare) == ("Tokens kept", "–", "from layer – on, by an unknown selector")
    assert draw_token_pruning(bare) == {}
    nothing = read(token_pruning(losses={"random": float("inf")}, entropies=[None]))
    assert draw_token_pruning(nothing) == {}


def test_each_plot_shows_what_there_is() -> None:
    losses, entropies = draw_token_pruning(read(STAGE)).values()
    assert losses.title == (
        "Loss by selector of tokens, the chosen one in full colour; dashed: random tokens"
    )
    assert losses.words == "logdet (chosen) 0.12, divprune 0.14, random 0.31, fastv 0.52"
    assert [re.findall(f">({name}[^<]*)<", losses.svg[1]) for name in ("logdet", "random")] == [
        ["logdet (chosen)"],
        ["random"],
    ]
    assert entropies.words.startswith("0 0.71; 1 0.69; 2 0.68; 3 0.41")
    assert entropies.words.endswith("tokens go before it: layer 3; the entropy collapses: layer 3")
    assert ">tokens go before it<" in entropies.svg[0]
    assert ">the entropy collapses<" in entropies.svg[0]
    plain = draw_token_pruning(read(token_pruning(collapse_layer=None, losses={"energy": 1.0})))
    assert "dashed" not in plain["token_losses"].title
    assert ">the entropy collapses<" not in plain["token_entropies"].svg[0]


@pytest.fixture
def all_drawn(plots: dict[str, Plot], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have every plot, though not their own."""
    every = plots | dict.fromkeys(("token_losses", "token_entropies"), plots["sizes"])
    monkeypatch.setattr("compress.report.write.draw_all", lambda facts: every)


def told(directory: Path) -> tuple[str, str]:
    """The page and the card."""
    html, card, *_ = write_report(directory)
    return html.read_text(), card.read_text()


@pytest.mark.usefixtures("all_drawn")
def test_page_and_card_tell_the_same(publish: Callable[..., Path]) -> None:
    directory = publish(stages=[STAGE], gates=[PERPLEXITY, LM_EVAL])
    html, card = told(directory)
    assert "<h2>Token pruning</h2>" in html
    assert "<dt>Visual tokens kept</dt><dd>25 %</dd>" in html
    for sentence in sentences(read(STAGE)):
        assert f"<li>{sentence}</li>" in html
        assert f"- {sentence}" in card.replace("\\", "")
    for name in ("token_losses", "token_entropies"):
        assert f"(report/{name}.png)" in card
        assert (directory / "report" / f"{name}.png").is_file()
    assert "- token-pruned\n" in card
    for text in (html, card):
        assert "they do not say how many answers stay right" in text
        assert "Gates other than lm_eval run the model on whole prompts" in text
        assert "prunes no tokens" not in text  # since this one is coded
    assert "AutoModelForImageTextToText.from_pretrained('model')" in card
    assert "AutoProcessor" in card
    assert "attach_stored" not in card


@pytest.mark.usefixtures("all_drawn")
def test_only_gates_on_whole_prompts_are_warned_of(publish: Callable[..., Path]) -> None:
    html, _ = told(publish(stages=[STAGE], gates=[LM_EVAL]))
    assert "Gates other than lm_eval" not in html
    html, card = told(publish("plain", gates=[PERPLEXITY]))
    assert "Gates other than lm_eval" not in html
    assert "Token pruning" not in html + card
    assert "token-pruned" not in card


@pytest.mark.usefixtures("all_drawn")
def test_images_are_shown_with_their_patches(publish: Callable[..., Path]) -> None:
    pictures = [entry(), entry(kept=[1]), entry(kept=[2]), entry(kept=[3])]
    html, _ = told(publish(stages=[token_pruning(pictures=pictures)]))
    outline = Outline(html)
    assert "image" in outline.tags
    assert html.count("<image ") == 3
    assert html.count(f'href="data:image/png;base64,{entry()["image"]}"/>') == 3
    assert '<path class="veil" transform="scale(1 1)" d="M1 0h2v1H1zM0 1h4v1H0z"/>' in html
    assert '<path class="frames" transform="scale(1 1)" d="M0 0h1v1H0zM3 0h1v1H3z"/>' in html
    assert '<svg viewBox="0 0 4 2" preserveAspectRatio="xMinYMid" role="img"' in html
    assert 'aria-label="Image 1: 2 of 8 patches stay; the others are darkened.' in html
    assert outline.text.count("1 of 8 patches stay") == 2
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in html


@pytest.mark.usefixtures("all_drawn")
def test_what_is_no_picture_is_not_in_the_page(publish: Callable[..., Path]) -> None:
    odd = [entry(data) for data in BAD.values()]
    odd += [entry(image=f"{entry()['image']}{HOSTILE}"), entry(kept=[HOSTILE]), HOSTILE, None]
    for number in range(0, len(odd), 3):
        pictures: list[Any] = odd[number : number + 3]
        html, _ = told(publish(f"m{number}", stages=[token_pruning(pictures=pictures)]))
        assert "<image" not in html
        assert "data:image" not in html
        assert "img-src" not in html
        assert "What stays of an image" not in html
        assert "<script" not in html


def hostile() -> dict[str, Any]:
    """Markup in names, values without bounds or of a wrong kind, lists without end."""
    return token_pruning(
        {"layer": HOSTILE},
        policy={"selector": HOSTILE, "target": HOSTILE, "keep": 1e299, "layer": 1 << 62},
        collapse_layer=1 << 61,
        entropies=[1e299, -1e299, 5e-324, None, HOSTILE] * 3000,
        losses={"random": -1e299, HOSTILE: 1e299} | {f"{HOSTILE}{i}": 10.0**-i for i in range(300)},
        less_than_random={"estimate": -1e299, "low": HOSTILE, "high": float("inf")},
        tokens=-1e299,
        flops_share=1e299,
        pictures=[entry(rows=1 << 62), entry(GOOD[:-1]), HOSTILE] * 1000,
    )


@pytest.mark.usefixtures("all_drawn")
def test_nothing_in_the_stage_is_taken_for_markup(publish: Callable[..., Path]) -> None:
    stage = hostile()
    del stage["metrics"]["less_than_random"]["high"]  # which no manifest can hold
    html, card = told(publish(stages=[stage]))
    outline = Outline(html)
    assert "script" not in outline.tags
    assert "<script" not in html + card
    assert outline.text.count("{{ 7*7 }}") > 10
    assert len(card) < 100_000


@pytest.mark.slow
def test_whatever_a_stage_holds_can_be_drawn() -> None:
    plots = draw_token_pruning(read(hostile()))
    assert list(plots) == ["token_losses", "token_entropies"]
    for each in plots.values():
        assert "<script" not in "".join(each.svg)
        assert sum(map(len, each.svg)) < 1_000_000
        assert each.png.startswith(b"\x89PNG")


@given(st.sampled_from([*STAGE["metrics"], "pictures"]), ODD)
def test_whatever_a_manifest_holds_can_be_read(member: str, value: Any) -> None:
    """A member of a wrong kind costs what hangs on it, not the report."""
    found = read(STAGE | {"metrics": STAGE["metrics"] | {member: value}})
    assert tile(found)
    assert sentences(found)
    assert "nan" not in re.findall(r"\w+", " ".join(sentences(found)))


@given(st.sampled_from(["policy", "losses", "less_than_random"]), st.data())
def test_whatever_a_finding_holds_can_be_read(member: str, data: st.DataObject) -> None:
    finding = STAGE["metrics"][member]
    odd = {data.draw(st.sampled_from(sorted(finding))): data.draw(ODD)}
    assert sentences(read(token_pruning({"layer": data.draw(ODD)}, **{member: finding | odd})))


@pytest.mark.slow
def test_what_the_stage_writes(tiny_llama: Path, tmp_path: Path) -> None:
    stage = {"target": "text", "keep": 0.5, "selector": "uniform", "insist": True, "recent": 8}
    recipe = recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 20, "length": 96},
            "stages": [{"prune_tokens": stage}],
        }
    )
    pipeline.run(recipe, tiny_llama, tmp_path / "out")
    found = collect_facts(tmp_path / "out").token_pruning
    assert found
    assert (found.target, found.keep, found.layer, found.selector) == ("text", 0.5, 2, "uniform")
    assert (found.sinks, found.recent, found.inputs, found.tokens) == (4, 8, 20, 84)
    assert found.insisted
    assert not found.named
    assert set(found.losses) == {"random", "uniform"}
    assert len(found.entropies) == 6
    assert found.less
    assert found.flops
    assert not found.overlays
    html, card = told(tmp_path / "out")
    assert "50 % of the tokens of a prompt, but for its first 4 and last 8," in html
    assert "<code>compress.tokens.attach_stored(model)</code> does" in html
    assert "pip install entropress" in card
    assert "from compress.tokens import attach_stored\nfrom transformers import Auto" in card
    assert "attach_stored(model)\n" in card
