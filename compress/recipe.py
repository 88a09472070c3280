"""Recipes: one YAML file of stages and gates; strict, versioned, overridable by path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from compress import gates, stages
from compress.errors import BadInput, did_you_mean
from compress.paths import data_dir
from compress.stages import Calibration, StageConfig
from compress.yaml_source import Lines, Location, at, override, read_yaml

Model = TypeVar("Model", bound=BaseModel)


class ModelOptions(StageConfig):
    """How the model is taken in. A ``dtype`` other than ``auto`` first rounds the weights to it."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


class _Document(StageConfig):
    """The recipe as written, before each stage's own options are checked."""

    version: Literal[1]
    model: ModelOptions = ModelOptions()
    calibration: Calibration = Calibration()
    stages: tuple[dict[str, Any] | str, ...] = ()
    gates: tuple[dict[str, Any] | str, ...] = ()


@dataclass(frozen=True)
class StageSpec:
    """One step of a recipe: the name of a registered stage and its checked options."""

    name: str
    config: StageConfig


@dataclass(frozen=True)
class GateSpec:
    """One claim about the outcome: the name of a registered gate and its checked options."""

    name: str
    config: StageConfig


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``name`` is the file's name without its ending.

    One without stages makes nothing, but its gates can be checked on what exists.
    """

    name: str
    model: ModelOptions
    calibration: Calibration
    stages: tuple[StageSpec, ...]
    gates: tuple[GateSpec, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with every default written out; parses back to an equal one."""
        return {
            "version": 1,
            "model": self.model.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json"),
            "stages": [{spec.name: spec.config.model_dump(mode="json")} for spec in self.stages],
            "gates": [{spec.name: spec.config.model_dump(mode="json")} for spec in self.gates],
        }


def load(recipe: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply ``path=value`` overrides.

    A bare name is looked for in the working directory, then among the shipped recipes. Raises
    `BadInput` naming the file, the line and the nearest known word.
    """
    if isinstance(recipe, Recipe):
        return parse(recipe.resolved(), overrides, name=recipe.name)
    path = find(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the recipe cannot be read: {error}", where=path) from None
    data, lines = read_yaml(text, str(path))
    return parse(data, overrides, name=path.stem, where=str(path), lines=lines)


def shipped() -> list[str]:
    """The file names of the recipes that come with the package."""
    return sorted(path.name for path in data_dir("recipes").glob("*.yaml"))


def find(recipe: str | Path) -> Path:
    """The file a recipe argument means; `BadInput` listing the shipped recipes if there is none."""
    path = Path(recipe)
    if path.is_file():
        return path
    if str(recipe) in shipped():
        return data_dir("recipes") / path
    raise BadInput("no such recipe", where=recipe, mend=f"shipped: {', '.join(shipped())}")


def parse(
    data: Any,
    overrides: Iterable[str] = (),
    *,
    name: str = "recipe",
    where: str = "recipe",
    lines: Lines | None = None,
) -> Recipe:
    """Check plain data as a recipe; ``where`` and ``lines`` serve the messages."""
    lines = dict(lines or {})
    if not isinstance(data, dict):
        raise BadInput("a recipe is a mapping", where=where, expected="keys version and stages")
    for assignment in overrides:
        data, location = override(data, assignment)
        lines.pop(location, None)
    document = _validate(_Document, data, (), where, lines)
    if not document.stages and not document.gates:
        raise BadInput("a recipe needs a stage", where=at(where, ("stages",), lines))
    specs = tuple(
        StageSpec(*_entry("stages", entry, i, where, lines))
        for i, entry in enumerate(document.stages)
    )
    claims = tuple(
        GateSpec(*_entry("gates", entry, i, where, lines)) for i, entry in enumerate(document.gates)
    )
    for index, spec in enumerate(specs[:-1]):
        if spec.name == "encode_weights":
            raise BadInput(
                "encode_weights must be the last stage: no stage can read what it writes",
                where=at(where, ("stages", index), lines),
            )
    return Recipe(name, document.model, document.calibration, specs, claims)


def _entry(
    part: Literal["stages", "gates"],
    entry: dict[str, Any] | str,
    index: int,
    where: str,
    lines: Lines,
) -> tuple[str, StageConfig]:
    """The name and checked options of one item of a recipe's stages or gates."""
    known, kind = (stages, "stage") if part == "stages" else (gates, "gate")
    entry = entry if isinstance(entry, dict) else {entry: None}
    spot = at(where, (part, index), lines)
    if len(entry) != 1:
        raise BadInput(
            f"a {kind} is one name with its options",
            where=spot,
            got=f"{len(entry)} keys",
            expected="'- name: {options}'",
        )
    [(name, options)] = entry.items()
    if name not in known.names():
        hint = did_you_mean(name, known.names())
        raise BadInput(f"unknown {kind} '{name}'", where=spot, mend=hint)
    location: Location = (part, index, name)
    config = _validate(
        known.get(name).Config, {} if options is None else options, location, where, lines
    )
    return name, config


def _validate(model: type[Model], data: Any, location: Location, where: str, lines: Lines) -> Model:
    """``data`` as a ``model``; its first fault as `BadInput`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key explains a missing one, so it comes first.
        fault, *_ = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    inner, kind = fault["loc"], fault["type"]
    spot = at(where, (*location, *inner), lines)
    if kind == "extra_forbidden":
        hint = did_you_mean(str(inner[-1]), _keys(model, inner[:-1]))
        raise BadInput(f"unknown key '{inner[-1]}'", where=spot, mend=hint)
    if kind == "missing":
        raise BadInput("missing key", where=spot)
    said = fault["msg"].removeprefix("Value error, ")
    got = None if isinstance(fault["input"], dict) else repr(fault["input"])
    raise BadInput(said[0].lower() + said[1:], where=spot, got=got)


def _keys(model: type[BaseModel], location: Location) -> list[str]:
    """The keys known at a nested location; none where no model stands there."""
    for part in location:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
