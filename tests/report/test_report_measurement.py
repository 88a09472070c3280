from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from compress.errors import BadInput, Missing
from compress.report import check_picture, write_picture
from compress.signals import BlockTable, Measurement


def measurement(scorers: tuple[str, ...] = ("cosine", "norm_ratio", "angular")) -> Measurement:
    """Six blocks on two sequences; the fourth writes a sink."""
    values = {
        scorer: [[place + 1.0 + shift, place + 1.5] for place in range(6)]
        for shift, scorer in enumerate(scorers)
    }
    table = BlockTable(values, [[int(block == 3)] * 2 for block in range(6)])
    return Measurement(table, frozenset({0, 5}), 2, "attention")


@pytest.mark.parametrize(("name", "start"), [("scores.png", b"\x89PNG"), ("scores.SVG", b"<?xml")])
def test_a_picture_is_of_the_kind_that_its_name_says(
    tmp_path: Path, name: str, start: bytes
) -> None:
    path = tmp_path / name
    path.write_text("an older one")
    write_picture(measurement(), path)
    first = path.read_bytes()
    assert first.startswith(start)
    write_picture(measurement(), path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_every_scorer_has_its_small_plot_and_every_mark_a_name(tmp_path: Path) -> None:
    write_picture(measurement(), tmp_path / "x.svg")
    drawn = re.findall(r"<!-- (.*?) -->", (tmp_path / "x.svg").read_text())  # texts drawn as shapes
    titles = [text for text in drawn if ": " in text]
    assert titles == ["attention: cosine", "attention: norm_ratio", "attention: angular"]
    assert {"first 2 to go", "protected", "other", "writes a sink"} <= set(drawn)


def test_the_first_to_go_are_those_of_each_scorers_order(tmp_path: Path) -> None:
    from compress.report.measurement import _panels

    found = measurement()
    for panel in _panels(found):
        assert list(panel.gone) == found.orders()[panel.scorer][:2] == [1, 2]
        assert panel.sinks == [3]
        assert list(panel.values) == found.table.means(panel.scorer)


@pytest.mark.parametrize("name", ["x.pdf", "x", "png", "x.png.txt"])
def test_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="expected .png or .svg"):
        check_picture(tmp_path / name)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for path in (tmp_path / "x.png", tmp_path / "nowhere" / "x.png"):
        with pytest.raises(BadInput, match="cannot be written"):
            check_picture(path)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Missing, match="pip install 'entropress\\[report\\]'"):
        check_picture(tmp_path / "x.svg")
