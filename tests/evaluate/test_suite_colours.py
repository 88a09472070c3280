"""The images of the shipped task: as documented, the same everywhere, answerable."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from typing import Any

import pytest

from compress.errors import Missing
from compress.evaluate.tasks import SUITE, load_tasks

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def colours() -> Any:
    spec = importlib.util.spec_from_file_location("colours", SUITE / "colours.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents() -> list[Any]:
    return list(load_tasks(["entropress_colours"]).leaves["entropress_colours"].test_docs())


def test_all_is_asked_equally_often(documents: list[Any]) -> None:
    asked = Counter((document["shape"], document["answer"]) for document in documents)
    assert len(documents) == 60
    assert set(asked.values()) == {5}
    assert len(asked) == 12
    assert len({document["seed"] for document in documents}) == 60


def test_the_answer_is_in_the_image_once(colours: Any, documents: list[Any]) -> None:
    for document in documents[::5]:  # each shape in each colour
        (image,) = colours.image(document)
        pixels = np.asarray(image)
        assert pixels.shape == (224, 224, 3)
        seen = {
            name: np.argwhere((pixels == colour).all(-1))
            for name, colour in colours.COLOURS.items()
        }
        assert {name for name, where in seen.items() if len(where)} == {
            shape["colour"] for shape in document["shapes"]
        }
        for shape in document["shapes"]:
            places = seen[shape["colour"]]
            (quarter,) = {2 * int(y >= 112) + int(x >= 112) for y, x in places}
            assert quarter == shape["quarter"]
            height, width = np.ptp(places, axis=0) + 1
            assert 55 <= height <= 88
            share = len(places) / (height * width)
            expected = {"square": 1, "circle": np.pi / 4, "triangle": 0.5}[shape["shape"]]
            assert share == pytest.approx(expected, abs=0.04)
        own = [shape for shape in document["shapes"] if shape["shape"] == document["shape"]]
        assert [shape["colour"] for shape in own] == [document["answer"]]


def test_images_are_the_same_everywhere(colours: Any, documents: list[Any]) -> None:
    """A change of any pixel is another version of the task."""
    pixels = b"".join(colours.image(document)[0].tobytes() for document in documents)
    assert (
        hashlib.sha256(pixels).hexdigest()
        == "1ef8f3b08126853ace3c1bc801709e85582dcbfd0695bcba39deabbe7c19dc04"
    )


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Red.", 1), (" The square is red, not blue", 1), ("blue or red", 0), ("reddish", 0)],
)
def test_the_first_colour_counts(answer: str, score: int, documents: list[Any]) -> None:
    from lm_eval.api.instance import Instance

    task = load_tasks(["entropress_colours"]).leaves["entropress_colours"]
    asked = Instance("generate_until", documents[0], ("", {}), 0, ("t", 0, 1))
    asked.resps = [answer]
    task._instances = [asked]
    task.apply_filters()
    found = task.process_results(documents[0], [asked.filtered_resps["none"]])
    assert documents[0]["answer"] == "red"
    assert found == {"exact_match": score}


def test_without_pillow_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util as util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "PIL" else find(name))
    with pytest.raises(Missing, match=r"entropress_colours: Pillow is not installed.*\[vision\]"):
        load_tasks(["entropress_colours"])
