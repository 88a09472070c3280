from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from compress import checkpoint as room
from compress.errors import BadInput, Corrupt
from compress.evaluate.lm import EntropressLM
from compress.prune import drop_sublayers

PAIRS = [("one two", " three"), ("", "four"), ("a b c", " d"), ("x" * 40, "y")]


def requests(arguments: list[Any], kind: str = "loglikelihood") -> list[Any]:
    return [Instance(kind, {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]


def generation(text: str, tokens: int) -> tuple[str, dict[str, Any]]:
    return text, {"until": ["\0"], "do_sample": False, "max_gen_toks": tokens}


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> EntropressLM:
    return EntropressLM(str(tiny_llama), batch_size=2)


def change(source: Path, directory: Path, edit: Any) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_it_answers_as_lm_evals_own_type(lm: EntropressLM, tiny_llama: Path) -> None:
    theirs = HFLM(str(tiny_llama), device="cpu", batch_size=2, softmax_dtype="float32")
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("a text",), ("x" * 300,)]),
        ("generate_until", [generation("abc", 5), generation("a longer one", 5)]),
    ):
        asked = requests(arguments, kind)
        expected = getattr(theirs, kind)(asked, disable_tqdm=True)
        assert getattr(lm, kind)(asked, disable_tqdm=True) == expected
    assert lm.truncated == 0
    assert lm.get_model_info()["model_num_parameters"] == theirs.model.num_parameters()


def test_what_is_skipped_is_not_computed_and_changes_no_answer(
    tiny_llama: Path, tmp_path: Path
) -> None:
    drop_sublayers(room.open(tiny_llama), (0, 3), (3,), tmp_path / "model")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    theirs = HFLM(str(tmp_path / "model"), device="cpu", batch_size=2, softmax_dtype="float32")
    ours = EntropressLM(str(tmp_path / "model"), batch_size=2)
    assert ours.model.num_parameters() < theirs.model.num_parameters()
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("generate_until", [generation("abc", 5), generation("a longer one", 5)]),
    ):
        asked = requests(arguments, kind)
        expected = getattr(theirs, kind)(asked, disable_tqdm=True)
        assert getattr(ours, kind)(asked, disable_tqdm=True) == expected


def test_log_likelihoods_are_finer_than_bfloat16(lm: EntropressLM) -> None:
    values = torch.tensor([value for value, _ in lm.loglikelihood(requests(PAIRS))])
    assert lm.model.dtype == torch.bfloat16
    assert (values != values.bfloat16().float()).any()


def test_what_is_too_long_is_cut_and_counted(tiny_llama: Path) -> None:
    lm = EntropressLM(str(tiny_llama), max_length=20)
    (long, short) = lm.loglikelihood(requests([("z" * 30 + "q" * 18, "abc"), ("q" * 18, "abc")]))
    assert long == short
    assert lm.truncated == 1
    lm.loglikelihood(requests([("q" * 18, "abc")]))  # 20 tokens read, the 21st only predicted
    assert lm.truncated == 1
    lm.generate_until(requests([generation("q" * 16, 5), generation("q" * 15, 5)]))
    assert lm.truncated == 2
    lm.loglikelihood_rolling(requests([("z" * 90,)]))
    assert lm.truncated == 2


def test_what_cannot_fit_is_refused(tiny_llama: Path) -> None:
    lm = EntropressLM(str(tiny_llama), max_length=20)
    with pytest.raises(
        BadInput, match="does not fit into the model, got 21 tokens, expected <= 20"
    ):
        lm.loglikelihood(requests([("a", "b" * 21)]))
    with pytest.raises(BadInput, match="task: does not fit .* 20 tokens to generate"):
        lm.generate_until(requests([generation("a", 20)]))
    with pytest.raises(BadInput, match="task: an answer without text"):
        lm.loglikelihood(requests([("a", "")]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(
    value: float, tiny_llama: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    lm = EntropressLM(str(change(tiny_llama, tmp_path / "model", spoil)))
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("a text",)]),
        ("generate_until", [generation("abc", 5)]),
    ):
        with pytest.raises(BadInput, match=f"{tmp_path}/model: the model's logits are not finite"):
            getattr(lm, kind)(requests(arguments, kind))


def test_weights_that_are_missing_are_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    directory = change(
        tiny_llama, tmp_path / "model", lambda tensors: tensors.pop("model.norm.weight")
    )
    with pytest.raises(Corrupt, match="weights do not fit the architecture"):
        EntropressLM(str(directory))


def test_a_model_without_a_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    LlamaModel(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(tmp_path / "base")
    for file in tiny_llama.glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match="has no language-model head"):
        EntropressLM(str(tmp_path / "base"))


def test_unknown_options_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="no option 'batchsize'; did you mean 'batch_size'"):
        EntropressLM(str(tiny_llama), batchsize=2)
    with pytest.raises(BadInput, match="no such directory"):
        EntropressLM("./nowhere")


def test_an_open_checkpoint_serves(lm: EntropressLM, tiny_llama: Path) -> None:
    opened = EntropressLM(room.open(tiny_llama), dtype="float32", device="cpu")
    assert opened.model.dtype == torch.float32
    (ours,), (other,) = (each.loglikelihood(requests(PAIRS[:1])) for each in (opened, lm))
    assert ours[0] == pytest.approx(other[0], rel=0.02)
    assert ours[0] != other[0]


def test_cuda_that_is_not_there_is_the_cpu(tiny_llama: Path) -> None:
    """lm-eval's command line asks for CUDA unless it is told otherwise."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    from compress.evaluate.lm import EntropressLM

    assert EntropressLM(str(tiny_llama), device="cuda").device.type == "cpu"
