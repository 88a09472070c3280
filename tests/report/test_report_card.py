from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from compress.checkpoint import read_manifest
from compress.errors import BadInput
from compress.recipe import parse
from compress.report import write_report
from compress.report.card import _END
from tests.report.conftest import LM_EVAL, PERPLEXITY, gate, row

pytestmark = pytest.mark.usefixtures("drawn_before")

ORIGINAL = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags:
- conversational
model-index:
- name: other
  results: []
---

# The first model

Its own words | with --- signs.
"""


def card(directory: Path) -> ModelCard:
    write_report(directory)
    return ModelCard.load(directory / "README.md")


def test_the_head_says_what_the_hub_needs(publish: Callable[..., Path]) -> None:
    found = card(publish(gates=[PERPLEXITY, LM_EVAL])).data
    assert found.library_name == "transformers"
    assert found.tags == ["entropress", "compressed", "near-lossless", "entropy-coded", "pruned"]
    assert found.model_name == "model"
    assert found.eval_results is not None
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in found.eval_results] == [
        ("local_arc_easy", "acc", 0.49),
        ("local_tiny", "acc", 0.5),
        ("builtin:heldout", "perplexity", 24.1),
    ]
    assert found.base_model is None


def test_a_card_round_trips(publish: Callable[..., Path]) -> None:
    directory = publish(gates=[PERPLEXITY, LM_EVAL])
    found = card(directory)
    assert str(found) == (directory / "README.md").read_text()


def test_the_base_model_is_a_hub_model(publish: Callable[..., Path]) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    hub = card(publish("hub", source={"id": "org/model", "revision": commit}))
    assert (hub.data.base_model, hub.data.base_model_relation) == ("org/model", "quantized")
    assert f"--revision {commit}" in hub.text
    demo = card(publish("demo", source={"id": "demo:x", "revision": "package==1"}))
    assert demo.data.base_model is None
    assert "pip install --no-deps package==1" in demo.text


def test_the_original_card_is_kept_once(publish: Callable[..., Path]) -> None:
    directory = publish()
    (directory / "README.md").write_text(ORIGINAL)
    first = card(directory)
    written = (directory / "README.md").read_bytes()
    assert (first.data.license, first.data.language) == ("apache-2.0", "en")
    assert first.data.pipeline_tag == "text-generation"
    assert first.data.tags is not None
    assert first.data.tags[:2] == ["conversational", "entropress"]
    assert first.data.eval_results is None  # those of the original are not ours
    assert first.text.count("# The first model") == first.text.count("# Original model card") == 1
    card(directory)
    assert (directory / "README.md").read_bytes() == written


def test_what_people_add_outside_the_marks_stays(publish: Callable[..., Path]) -> None:
    directory = publish()
    text = str(card(directory))
    (directory / "README.md").write_text(text.replace("no gate ran", "a lie") + "\nMy own words.\n")
    again = card(directory).text
    assert "a lie" not in again
    assert again.count("My own words.") == 1
    assert again.index(_END) < again.index("My own words.")


@pytest.mark.parametrize(
    "original",
    [
        "no head at all\n",
        "---\n- a list\n---\nbody\n",
        "---\na: [\n---\nbody\n",
        "",
        "\ufeff# Bom\n",
    ],
)
def test_an_original_without_a_usable_head_keeps_its_text(
    publish: Callable[..., Path], original: str
) -> None:
    directory = publish()
    (directory / "README.md").write_text(original)
    found = card(directory)
    assert found.text.rstrip().endswith(original.strip("\ufeff\n") or _END)
    assert found.data.license is None
    written = (directory / "README.md").read_bytes()
    card(directory)
    assert (directory / "README.md").read_bytes() == written


def test_the_recipe_can_be_copied_from_the_card(publish: Callable[..., Path]) -> None:
    directory = publish()
    [copied] = re.findall(r"```yaml\n(.*?)```", card(directory).text, re.DOTALL)
    recorded = read_manifest(directory)["recipe"]
    assert parse(yaml.safe_load(copied)).resolved() == parse(recorded).resolved()
    assert next(iter(yaml.safe_load(copied))) == "version"


HOSTILE = f"<script>x</script> | `a` [b](c)\n# head {_END} ``` end"


def test_nothing_in_the_manifest_is_taken_for_markdown(publish: Callable[..., Path]) -> None:
    gates = [gate(HOSTILE, "failed", row(HOSTILE, "failed", note=HOSTILE), summary=HOSTILE)]
    directory = publish(
        gates=gates,
        source={"id": HOSTILE, "revision": None},
        recipe={"version": 1, "note": HOSTILE},
        stages=[{"stage": HOSTILE, "summary": HOSTILE}],
    )
    (directory / "README.md").write_text(ORIGINAL)
    text = card(directory).text
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\[b", outside)
    assert not re.search(r"^# head", outside, re.MULTILINE)
    [line] = [line for line in outside.splitlines() if line.startswith("| ") and "failed" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == 8
    assert text.count(_END) == 1
    written = (directory / "README.md").read_bytes()
    card(directory)
    assert (directory / "README.md").read_bytes() == written


def test_a_card_that_is_not_ours_is_not_replaced_elsewhere(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    directory, output = publish(), tmp_path / "elsewhere"
    output.mkdir()
    (output / "README.md").write_text("# A project\n")
    with pytest.raises(BadInput, match="exists already"):
        write_report(directory, output)
    assert (output / "README.md").read_text() == "# A project\n"
    assert not (output / "report.html").exists()
    (output / "README.md").unlink()
    write_report(directory, output)
    write_report(directory, output)


def test_a_card_that_is_a_link_out_of_the_directory_is_not_read(
    publish: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret words")
    directory = publish()
    (directory / "README.md").symlink_to(tmp_path / "secret")
    assert "secret words" not in card(directory).text
    assert (tmp_path / "secret").read_text() == "secret words"
