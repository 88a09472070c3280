from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress.checkpoint import read_manifest, write_manifest
from compress.errors import Missing
from compress.report import write_report
from compress.report.canvas import DARK, LIGHT
from compress.report.gates import Gate, Row, read_gates
from compress.report.page import bar
from compress.report.wording import figure, interval, size
from tests.report.conftest import LM_EVAL, PERPLEXITY, gate, row

HOSTILE = '<script>alert("x")</script> & {{ 7*7 }} \u202e'
EMPTY = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """Checks that elements are closed in order; collects tags and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(directory: Path) -> str:
    write_report(directory)
    return (directory / "report.html").read_text()


@pytest.mark.usefixtures("drawn_before")
def test_the_page_stands_alone(publish: Callable[..., Path]) -> None:
    text = page(publish(gates=[PERPLEXITY, LM_EVAL]))
    outline = Outline(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & outline.tags
    assert "default-src 'none'" in text
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text
    assert len(text.encode()) < 1_500_000
    for heading in ("Pruning", "Gates", "Sizes by kind of tensor", "Entropy by block", "Reproduce"):
        assert f"<h2>{heading}</h2>" in text
    assert "19.17 → 24.1" in outline.text
    assert "1.257 [1.21, 1.298]" in outline.text
    assert "lost 61, method tango, won 22" in outline.text


def test_what_is_written_and_that_it_is_the_same_twice(publish: Callable[..., Path]) -> None:
    directory = publish(gates=[PERPLEXITY])
    files = write_report(directory)
    first = [file.read_bytes() for file in files]
    assert [file.relative_to(directory).as_posix() for file in files] == [
        "report.html",
        "README.md",
        *(f"report/{name}.png" for name in ("scores", "sizes", "entropy", "exponents")),
    ]
    assert all(data.startswith(b"\x89PNG") for data in first[2:])
    assert sum(map(len, first)) < 1_500_000
    again = write_report(directory, directory.with_name("elsewhere"))
    assert [file.read_bytes() for file in again] == first


@pytest.mark.usefixtures("drawn_before")
def test_colours_follow_the_scheme_and_ids_lead_somewhere(publish: Callable[..., Path]) -> None:
    text = page(publish())
    style, _, body = text.partition("</style>")
    assert all(f"--{name}: {colour}" in style for name, colour in (LIGHT | DARK).items())
    assert not re.findall(r"#[0-9a-f]{6}\b", body)
    ids = re.findall(r'\bid="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", body) + re.findall(r'href="#([^"]+)"', body))
    assert used
    assert used <= set(ids)


@pytest.mark.usefixtures("drawn_before")
def test_nothing_in_the_manifest_is_taken_for_markup(publish: Callable[..., Path]) -> None:
    gates = [gate(HOSTILE, "failed", row(HOSTILE, note=HOSTILE), summary=HOSTILE)]
    gates[0]["details"] = {HOSTILE: HOSTILE}
    text = page(
        publish(
            gates=gates,
            source={"id": HOSTILE, "revision": HOSTILE},
            stages=[{"stage": HOSTILE, "summary": HOSTILE}],
            versions={HOSTILE: HOSTILE},
            recipe={"version": 1, HOSTILE: HOSTILE},
        )
    )
    outline = Outline(text)
    assert "script" not in outline.tags
    assert "<script" not in text
    assert outline.text.count("alert") >= 10
    assert "{{ 7*7 }}" in outline.text


def test_names_of_tensors_are_no_markup_in_a_plot(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    model = publish(tensors={})
    for name in ("model.safetensors", "config.json"):
        (model / name).unlink()
    names = ["<b>$x_{1$.weight", "\x01\ufffe.w", "&amp;.w", "字.w"]
    save_file({name: torch.randn(8) for name in names}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    write_manifest(model, read_manifest(model))
    outline = Outline(page(model))
    assert "b" not in outline.tags
    assert "<b>$x_{1$" in outline.text


@pytest.mark.usefixtures("drawn_before")
@pytest.mark.parametrize(
    ("gates", "title", "colour"),
    [
        ([], "Not gated", "not-gated"),
        ([PERPLEXITY], "Passed: 1 of 1 gates", "passed"),
        ([PERPLEXITY, gate("kl", "undecided")], "Undecided: 1 of 2 gates", "undecided"),
        ([PERPLEXITY, gate("kl", "pending")], "Not checked yet: 1 of 2 gates", "pending"),
        ([gate("kl", "undecided"), PERPLEXITY, LM_EVAL], "Failed: 1 of 3 gates", "failed"),
    ],
)
def test_the_banner_claims_no_more_than_was_checked(
    publish: Callable[..., Path], gates: list[dict[str, Any]], title: str, colour: str
) -> None:
    text = page(publish(gates=gates))
    assert f'<section class="banner {colour}" aria-label="verdict">\n<strong>{title}' in text
    shown = re.findall(r'<h3 class="(\w[\w-]*)">', text)
    assert shown == sorted(shown, key=["failed", "undecided", "pending", "passed"].index)
    assert ("No gate ran" in text) == (not gates)


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read(palette: dict[str, str]) -> None:
    assert len(set(palette.values())) == len(palette)
    for name in ("ink", "muted", "accent", "bad", "warn", "good"):
        for ground in ("paper", "panel"):
            assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)


FINITE = st.none() | st.floats(-1e6, 1e6)


@given(FINITE, FINITE, FINITE, FINITE)
def test_a_bar_keeps_the_order_of_its_numbers(
    low: float | None, value: float | None, high: float | None, limit: float | None
) -> None:
    low, value, high = sorted((low, value, high), key=lambda x: (x is None, x))
    found = Row("x", "", None, None, value, low, high, limit, None, "passed", "")
    drawn = bar(Gate("lm_eval", {}, "passed", "", "", [found], []), found)
    if value is None or limit is None:
        assert drawn is None
        return
    assert drawn is not None
    assert 0 <= drawn.low <= drawn.value <= drawn.high <= 100
    assert 0 <= drawn.limit <= 100
    assert (drawn.value <= drawn.limit) or value > limit
    assert bar(Gate("bit_exact", {}, "passed", "", "", [found], []), found) is None


def test_an_unbounded_interval_reaches_both_ends() -> None:
    [found] = read_gates([LM_EVAL])
    drawn = bar(found, found.rows[1])
    assert drawn is not None
    assert (drawn.low, drawn.high) == (0, 100)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (3, "3"), (1234567, "1,234,567"), (-0.5, "−0.5"), (1.25678, "1.257"), (0.0, "0")],
)
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_sizes_and_intervals() -> None:
    assert [size(n) for n in (0, 999, 1000, 160_334_027, 999_999_999)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "160.3 MB",
        "1.0 GB",
    ]
    assert interval(None, 0.5) == "[−∞, 0.5]"


@pytest.mark.usefixtures("drawn_before")
def test_without_matplotlib_nothing_is_written(
    publish: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = publish()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Missing, match="pip install 'entropress\\[report\\]'"):
        write_report(directory)
    assert not (directory / "report.html").exists()


def test_a_model_with_nothing_to_plot(publish: Callable[..., Path]) -> None:
    model = publish(stages=[], tensors={})
    (model / "model.safetensors").unlink()
    save_file({"codes": torch.arange(40)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    files = write_report(model)
    assert [file.name for file in files] == ["report.html", "README.md", "sizes.png"]
    assert "Entropy by block" not in files[0].read_text()
