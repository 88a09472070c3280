from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.report import write_report
from compress.report.canvas import Plot
from compress.report.pruning import Pruning, read_prunings, together
from compress.report.pruning_plots import draw_pruning
from compress.report.pruning_words import chooser, sentences, tile, units
from tests.report.conftest import JOINT, pruning, table


def read(stage: dict[str, Any]) -> Pruning:
    [found] = read_prunings([stage])
    return found


def said(stage: dict[str, Any]) -> str:
    return "\n".join(sentences(read(stage)))


def candidates(*losses: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [
        {"rule": rule, "removed": {"block": [i + 1]}, "kl": kl}
        for i, (rule, kl) in enumerate(losses)
    ]


def test_what_a_joint_search_did() -> None:
    found = read(JOINT)
    assert found.removed == {"attention": [2, 4], "mlp": [3]}
    attention, mlp = found.scores
    assert (attention.kind, attention.gone, attention.protected) == ("attention", [2, 4], [0, 5])
    assert (mlp.kind, mlp.gone, mlp.sinks) == ("mlp", [3], [1])
    assert [each.rule for each in found.candidates] == ["cosine", "knn_entropy", "last_k"]
    assert tile(found) == (
        "Removed",
        "2 attention, 1 MLP of 6",
        "chosen by evolutionary search",
    )
    assert sentences(found) == [
        "Removed: attention of blocks 2, 4; MLP of block 3, of 6 blocks, "
        "chosen by evolutionary search.",
        "Protected: blocks 0, 5.",
        "Budget: 20 % of the coded bytes asked, 21.41 % reached.",
        "The entropy scorer knn_entropy loses here: what it would remove costs 0.31 nats a token "
        "on the search text, what cosine would remove 0.21.",
        "Search: evolutionary, 2 generations; the best KL on its text went from 0.3 to 0.19 nats "
        "a token.",
        "On held-out windows of the calibration text the one-shot set costs 0.22 nats a token, "
        "the one found 0.2; the found set was removed.",
        "Healing (distill, 3 steps): KL 0.2 → 0.12 nats a token on text that it was not fitted "
        "to; kept.",
    ]


def test_a_second_pruning_speaks_of_original_blocks() -> None:
    first = pruning(removed={"block": [1, 3]})
    second = pruning(
        blocks=4,
        removed={"block": [2], "mlp": [0]},
        signals={"block": table({"cosine": [4.0, 3, 1, 2]}, protected=[3], sink_writers=[1])},
        candidates=[{"rule": "last_k", "removed": {"block": [3]}, "kl": 0.5}],
    )
    del second["metrics"]["signals"]["block"]["standard_errors"]
    prunings = read_prunings([first, {"stage": "encode_weights"}, second])
    assert together(prunings) == {"block": [1, 3, 4], "mlp": [0]}
    [scores] = prunings[1].scores
    assert (scores.blocks, scores.gone, scores.protected) == ([0, 2, 4, 5], [4], [5])
    assert (scores.sinks, scores.errors) == ([2], [None] * 4)
    assert prunings[1].candidates[0].removed == {"block": [5]}
    second["metrics"]["blocks"] = 5  # not those that were left
    assert read_prunings([first, second]) == prunings[:1]


def test_without_scores_of_its_own_a_rule_shows_another() -> None:
    stage = pruning({"scorer": "last_k"})
    [scores] = read(stage).scores
    assert scores.scorer == "cosine"
    stage["metrics"]["signals"] = {"block": table({"cosine": [1.0]})}
    assert read(stage).scores == []
    assert draw_pruning(read_prunings([stage])) == {}


@pytest.mark.parametrize(
    ("config", "search", "expected"),
    [
        ({}, None, "cosine"),
        ({"scorer": "last_k"}, None, "last_k"),
        ({"scorer": "last_k", "search": "evolutionary"}, {"kept": "one_shot"}, "cosine"),
        ({"search": "greedy"}, None, "greedy search"),
        ({"search": "greedy"}, {"kept": "found"}, "greedy search"),
        ({"search": "greedy"}, {"kept": "one_shot"}, "cosine"),
        ({"search": "best_scorer"}, {"kept": "found"}, "cosine, the best of 1 rules"),
    ],
)
def test_who_chose(config: dict[str, Any], search: dict[str, Any] | None, expected: str) -> None:
    assert chooser(read(pruning(config, search=search))) == expected


@pytest.mark.parametrize(
    ("scorer", "losses", "expected"),
    [
        ("knn_entropy", [("knn_entropy", 0.3), ("last_k", 0.2)], "entropy scorer knn_entropy"),
        ("cosine", [("cosine", 0.2), ("renyi_entropy", 0.3)], "entropy scorer renyi_entropy"),
        ("cosine", [("cosine", 0.3), ("last_k", 0.2)], "scorer cosine"),
        ("cosine", [("cosine", 0.2), ("last_k", 0.3)], None),
        ("knn_entropy", [("knn_entropy", 0.2), ("cosine", 0.2)], None),
        ("bucket_entropy", [("bucket_entropy", 0.3), ("knn_entropy", 0.2)], "bucket_entropy"),
    ],
)
def test_a_scorer_that_loses_is_named(
    scorer: str, losses: list[tuple[str, float]], expected: str | None
) -> None:
    words = said(pruning({"scorer": scorer}, candidates=candidates(*losses)))
    assert words.count("loses here") == (expected is not None)
    if expected:
        assert f"{expected} loses here: what it would remove costs 0.3 nats" in words


def test_what_was_not_measured_is_said_so() -> None:
    words = said(pruning(candidates=candidates(("cosine", None), ("last_k", None))))
    assert "was not measured, so nothing here says that cosine is better" in words
    assert "not measured" not in said(pruning())  # there is but one set


def test_a_search_and_a_healing_that_do_not_help_are_said_so() -> None:
    words = said(
        pruning(
            {"search": "greedy"},
            search={"method": "greedy", "one_shot_kl": 0.2, "found_kl": 0.3, "kept": "one_shot"},
            healing={"method": "linear", "kl_before": 0.2, "kl_after": 0.5, "kept": False},
            stability={"same_choice": 0.735, "ranks": []},
        )
    )
    assert "the one found 0.3; the one-shot set was removed." in words
    assert "Healing (linear): KL 0.2 → 0.5 nats a token" in words
    assert "not kept, the weights are as pruned." in words
    assert "73.5 % of the draws" in words


def test_each_plot_shows_what_there_is() -> None:
    assert list(draw_pruning(read_prunings([JOINT]))) == ["scores", "search", "healing"]
    fewer = {"block": table({"cosine": [4.0, 3, 2, 1, 5]})}
    second = pruning(blocks=5, removed={"block": [3]}, signals=fewer)
    plots = draw_pruning(read_prunings([pruning(), second]))
    assert list(plots) == ["scores"]
    text = plots["scores"].svg[0]
    for label in ("removed", "other", "block: cosine (pruning 2)"):
        assert f">{label}<" in text
    assert "protected" not in text
    assert "writes a sink" not in text
    assert "block by cosine (pruning 1): 0 9, 1 5" in plots["scores"].words
    assert "3 1 removed" in plots["scores"].words


@pytest.fixture
def all_drawn(plots: dict[str, Plot], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have every plot, though not their own."""
    every = plots | dict.fromkeys(("search", "healing"), plots["scores"])
    monkeypatch.setattr("compress.report.write.draw_all", lambda facts: every)


@pytest.mark.usefixtures("all_drawn")
def test_page_and_card_tell_the_same(publish: Callable[..., Path]) -> None:
    directory = publish(stages=[JOINT])
    html, card, *_ = (file.read_text(errors="replace") for file in write_report(directory))
    for sentence in sentences(read(JOINT)):
        assert f"<li>{sentence}</li>" in html
        assert f"- {sentence}" in card.replace("\\_", "_")
    rows = re.findall(r'<th scope="row">(\w+)</th><td class="left">(.*?)</td><td>(.*?)<', html)
    told = [(each.rule, units(each.removed)) for each in read(JOINT).candidates]
    assert [row[:2] for row in rows[:3]] == told
    assert [kl for _, _, kl in rows[:3]] == ["0.21", "0.31", "–"]
    assert "| last_k | attention of block 4; MLP of blocks 3, 4 | – |" in card.replace("\\_", "_")
    for name in ("scores", "search", "healing"):
        assert f"(report/{name}.png)" in card
        assert (directory / "report" / f"{name}.png").is_file()
    assert "- pruned" in card


@pytest.mark.usefixtures("drawn_before")
def test_the_chosen_set_is_marked(publish: Callable[..., Path]) -> None:
    stage = pruning(candidates=candidates(("a", 0.3), ("b", 0.2), ("cosine", 0.1)))
    html, card, *_ = (f.read_text(errors="replace") for f in write_report(publish(stages=[stage])))
    assert html.count("<strong>(removed)</strong>") == card.count("(removed) |") == 1
    assert "block 3 <strong>(removed)</strong></td><td>0.1<" in html


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "<b>", "kl"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["block", "mlp", "kl", "rule", "removed"]), inner)
    ),
    max_leaves=6,
)


@given(st.sampled_from(sorted(JOINT["metrics"])), ODD)
def test_whatever_a_manifest_holds_can_be_read(member: str, value: Any) -> None:
    """A member of a wrong kind costs what hangs on it, not the report."""
    stage = JOINT | {"metrics": JOINT["metrics"] | {member: value}}
    for found in read_prunings([stage, stage]):
        assert all(0 <= block < 6 for blocks in found.removed.values() for block in blocks)
        assert tile(found)
        assert sentences(found)


@given(st.sampled_from(["search", "healing", "budget"]), st.data())
def test_whatever_a_finding_holds_can_be_read(member: str, data: st.DataObject) -> None:
    finding = JOINT["metrics"][member]
    odd = {data.draw(st.sampled_from(sorted(finding))): data.draw(ODD)}
    stage = JOINT | {"metrics": JOINT["metrics"] | {member: finding | odd}}
    assert sentences(read(stage))
