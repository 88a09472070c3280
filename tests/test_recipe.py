from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress import recipe as recipes
from compress.errors import BadInput

ENCODE = {"version": 1, "stages": [{"encode_weights": {}}]}
PRUNE = {"version": 1, "stages": [{"prune_blocks": {"drop": 1}}, {"encode_weights": {}}]}


def write(directory: Path, text: str) -> Path:
    path = directory / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_are_valid_and_round_trip(name: str) -> None:
    recipe = recipes.load(name)
    assert recipes.parse(recipe.resolved(), name=recipe.name) == recipe
    assert recipe.gates or recipe.stages[-1].name == "encode_weights"


def test_a_name_is_looked_for_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.load("entropy_prune.yaml").stages[0].name == "prune_blocks"
    (tmp_path / "entropy_prune.yaml").write_text(yaml.safe_dump(ENCODE))
    assert recipes.load("entropy_prune.yaml").stages[0].name == "encode_weights"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("~/a.txt", "HOME/a.txt"),
        ("./a.txt", "./a.txt"),
        ("b/../a.txt", "b/../a.txt"),
        ("a~.txt", "a~.txt"),
        ("~no-such-user/a.txt", "~no-such-user/a.txt"),
        ("builtin:heldout", "builtin:heldout"),
    ],
)
def test_a_home_directory_is_expanded_once(
    data: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "HOME")
    recipe = recipes.parse({**PRUNE, "calibration": {"data": data}})
    assert recipe.calibration.data == expected


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(BadInput, match=r"no such recipe.*gates\.yaml, lossless\.yaml"):
        recipes.load("lossles.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "version: 1\nstages:\n  - prune_blocks:\n      dorp: 2\n",
            r":4: stages\.0\.prune_blocks\.dorp: unknown key 'dorp'; did you mean 'drop'\?",
        ),
        ("version: 1\nstagse: []\n", r":2: stagse: unknown key|stages: missing key"),
        (
            "version: 1\nmodel: {dtype: bf16}\nstages: [encode_weights: {}]\n",
            r":2: model\.dtype: .*'bfloat16'.*got 'bf16'",
        ),
        (
            "version: 1\nstages:\n  - encode_weihgts: {}\n",
            r":3: stages\.0: unknown stage 'encode_weihgts'; did you mean 'encode_weights'\?",
        ),
        ("version: 2\nstages: [encode_weights]\n", r":1: version: .*got 2"),
        ("stages: [encode_weights]\n", r"version: missing key"),
        ("version: 1\nstages: []\n", r":2: stages: a recipe needs a stage"),
        (
            "version: 1\nstages:\n- {encode_weights: {}, prune_blocks: {}}\n",
            r":3: .*one name.*got 2 keys",
        ),
        (
            "version: 1\nstages:\n- encode_weights\n- prune_blocks: {drop: 1}\n",
            r":3: stages\.0: encode_weights must be the last",
        ),
        ("version: 1\nversion: 1\nstages: []\n", r":2: key 'version' stands twice"),
        ("version: 1\nstages: [\n", r"mine\.yaml:\d: not valid YAML"),
        ("a: &a [*a]\n", r":1: aliases are not allowed"),
        ("- 1\n", r"a recipe is a mapping"),
        (
            "version: 1\ncalibration: {length: 0}\nstages: [encode_weights]\n",
            r":2: calibration\.length: .*got 0",
        ),
        ("version: 1\nstages: [prune_blocks: 3]\n", r":2: stages\.0\.prune_blocks: .*got 3"),
    ],
)
def test_faults_name_file_line_and_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        recipes.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["stages.prune_blocks.drop", "stages.0.drop", "stages.0.prune_blocks.drop"]
)
def test_a_stage_option_is_set_by_name_or_position(path: str) -> None:
    recipe = recipes.parse(PRUNE, [f"{path}=3"])
    assert recipe.stages[0].config.drop == 3
    assert PRUNE["stages"][0] == {"prune_blocks": {"drop": 1}}  # the input is left alone


def test_an_option_that_the_recipe_leaves_out_can_be_set() -> None:
    assert recipes.parse(ENCODE, ["calibration.seed=7"]).calibration.seed == 7
    bare = {"version": 1, "stages": ["prune_blocks"]}
    assert recipes.parse(bare, ["stages.prune_blocks.drop=3"]).stages[0].config.drop == 3


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("calibration.sead=1", r"calibration\.sead: unknown key 'sead'; did you mean 'seed'"),
        ("colour=red", r"unknown key 'colour'"),
        ("stages.prune_block.drop=1", r"no stage 'prune_block'; did you mean 'prune_blocks'"),
        ("stages.7.drop=1", r"no stage '7'"),
        ("stages.prune_blocks.dorp=1", r"unknown key 'dorp'; did you mean 'drop'"),
        ("stages.prune_blocks=1", r"names no option"),
        ("version.minor=1", r"inside a plain value"),
        ("calibration.seed", r"not an override.*expected path=value"),
        ("calibration..seed=1", r"not an override"),
        ("calibration.seed=[", r"not valid YAML"),
        ("calibration.seed=many", r"calibration\.seed: .*got 'many'"),
    ],
)
def test_an_override_that_leads_nowhere_is_an_error(assignment: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        recipes.parse(PRUNE, [assignment])


def test_a_stage_that_stands_twice_needs_its_position() -> None:
    twice = {"version": 1, "stages": [{"prune_blocks": {"drop": 1}}, {"prune_blocks": {"drop": 1}}]}
    with pytest.raises(BadInput, match="stands more than once; use its position"):
        recipes.parse(twice, ["stages.prune_blocks.drop=3"])
    recipe = recipes.parse(twice, ["stages.1.drop=3"])
    assert [spec.config.drop for spec in recipe.stages][1] == 3


@given(
    sequences=st.integers(1, 10**6),
    length=st.integers(8, 10**6),
    seed=st.integers(-(2**40), 2**40),
    dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16"]),
    drop=st.integers(1, 40),
)
def test_resolved_recipes_and_overrides_agree(
    sequences: int, length: int, seed: int, dtype: str, drop: int
) -> None:
    data = {
        "version": 1,
        "model": {"dtype": dtype},
        "calibration": {"sequences": sequences, "length": length, "seed": seed},
        "stages": [{"prune_blocks": {"drop": drop}}, {"encode_weights": {}}],
    }
    written = recipes.parse(data)
    overridden = recipes.parse(
        PRUNE,
        [
            f"model.dtype={dtype}",
            f"calibration.sequences={sequences}",
            f"calibration.length={length}",
            f"calibration.seed={seed}",
            f"stages.prune_blocks.drop={drop}",
        ],
    )
    assert written == overridden
    again = yaml.safe_load(yaml.safe_dump(written.resolved()))
    assert recipes.parse(again) == written


@given(st.text())
def test_any_text_gives_a_recipe_or_one_clear_line(text: str) -> None:
    from compress.yaml_source import read_yaml

    try:
        data, lines = read_yaml(text, "file")
        recipes.parse(data, lines=lines)
    except BadInput as error:
        assert "\n" not in str(error)
