"""The images and questions that token pruning is measured on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "vlm"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the benchmark; its dataclasses look their module up while they are made."""
    spec = importlib.util.spec_from_file_location(f"vlm_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("task", monkeypatch)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("toy", monkeypatch)


@pytest.mark.parametrize("size", [112, 224])
def test_an_example_is_its_number_and_seed(task: ModuleType, size: int) -> None:
    few, more = (list(task.examples(n, "train", size=size, seed=3)) for n in (2, 5))
    other = list(task.examples(2, "train", size=size, seed=4))
    assert few[0].image.shape == (size, size, 3)
    assert few[0].image.dtype == np.uint8
    for i in range(2):
        assert np.array_equal(few[i].image, more[i].image)
        assert few[i].answer == more[i].answer
        assert not np.array_equal(few[i].image, other[i].image)


def test_a_pass_shows_every_held_out_scan_once(task: ModuleType) -> None:
    from sklearn.datasets import load_digits

    answers = [one.answer for one in task.examples(task.HELD_OUT, "heldout")]
    assert sorted(answers) == sorted(load_digits().target[-task.HELD_OUT :])


def test_the_digit_is_in_its_box(task: ModuleType) -> None:
    for one in task.examples(20, "heldout"):
        top, left, side = one.box
        assert 40 <= side <= 56
        inside = one.image[top : top + side, left : left + side]
        assert inside.shape == (side, side, 3)
        assert np.ptp(inside.mean(-1)) >= 60  # ink and paper are apart


def test_the_splits_share_no_background(task: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    left = np.zeros((300, 640, 3), np.uint8)
    left[:, 320:] = 255
    monkeypatch.setattr(task, "_photographs", lambda: [left, left])
    for split, colour in (("train", 0), ("heldout", 255)):
        for one in task.examples(10, split):
            outside = np.ones((112, 112), bool)
            top, start, side = one.box
            outside[top : top + side, start : start + side] = False
            assert (one.image[outside] == colour).all()


def test_accuracy_asks_for_the_likeliest_digit(task: ModuleType) -> None:
    """By a model that always likes the 7 best among the digits, and something else still more."""

    class Given(dict[str, Any]):
        def to(self, device: str) -> Given:
            return self

    class Model:
        device = "cpu"

        def __call__(self, ids: torch.Tensor, logits_to_keep: int) -> Any:
            logits = torch.zeros(len(ids), 1, 64)
            logits[..., 40 + 7], logits[..., 3] = 5, 9
            return type("Out", (), {"logits": logits})

    class Tokenizer:
        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [40 + int(token) for token in tokens]

    class Processor:
        tokenizer = Tokenizer()

        def __call__(self, images: list[Any], text: list[str], **options: Any) -> Given:
            return Given(ids=torch.zeros(len(text), 5))

    asked = list(task.examples(30, "heldout"))
    right = task.accuracy(Model(), Processor(), asked, batch=7)
    assert right == [one.answer == 7 for one in asked]
    assert any(right)
    likely = task.log_likelihoods(Model(), Processor(), asked[:3])
    assert torch.allclose(likely.exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize(("copies", "clutter"), [(1, 0), (2, 16), (40, 24)])
def test_the_toy_shows_its_digit_as_often_as_asked(
    toy: ModuleType, copies: int, clutter: int
) -> None:
    drawn = toy.questions(5, "heldout", copies=copies, clutter=clutter, seed=1)
    assert drawn.shown.sum(1).tolist() == [copies] * 5
    patches = drawn.pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    for image, shown, ids in zip(patches, drawn.shown, drawn.ids, strict=True):
        colour = int(ids[-2]) - toy.FIRST_COLOUR
        strength = image[:, colour].amax((1, 2)) - image.sum(1).sub(image[:, colour]).amax((1, 2))
        assert set(strength.topk(copies).indices.tolist()) == set(shown.nonzero()[:, 0].tolist())


def test_the_toy_model_takes_its_questions_and_can_learn(toy: ModuleType) -> None:
    model = toy.tiny_llava()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drawn = toy.questions(4, "train")
    assert model(**drawn.inputs()).logits.shape == (4, 67, toy.VOCABULARY)
    assert len(toy.accuracy(model, drawn, batch=3)) == 4
    toy.train(model, 2, copies=2, clutter=16, seed=0, batch=4)
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, before[name])]
    assert any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)
