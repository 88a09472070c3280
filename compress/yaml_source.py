"""YAML as plain data that remembers its lines, and overrides of it by dotted path."""

from __future__ import annotations

from typing import Any

import yaml

from compress.errors import BadInput, did_you_mean

Location = tuple[str | int, ...]
Lines = dict[Location, int]
_ITEMS = {"stages": "stage", "gates": "gate"}


def read_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """Plain data, and the line of every key and list item by location.

    Raises `BadInput` with the line for anything but one YAML document with distinct keys.
    """
    lines: Lines = {}
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):  # a few of them can stand for gigabytes
                raise BadInput(
                    "aliases are not allowed", where=f"{where}:{token.start_mark.line + 1}"
                )
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _collect_lines(root, (), lines, where)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        spot = where if mark is None else f"{where}:{mark.line + 1}"
        raise BadInput(f"not valid YAML: {problem}", where=spot) from None
    except RecursionError:
        raise BadInput("not valid YAML: nested too deeply", where=where) from None


def _collect_lines(node: yaml.Node, location: Location, lines: Lines, where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            inner = (*location, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                raise BadInput(f"key '{key.value}' stands twice", where=f"{where}:{line}")
            lines[inner] = line
            _collect_lines(child, inner, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*location, index)] = child.start_mark.line + 1
            _collect_lines(child, (*location, index), lines, where)


def at(where: str, location: Location, lines: Lines) -> str:
    """``file:line: dotted.path``, with the line of the innermost part that has one."""
    outward = (location[:end] for end in range(len(location), 0, -1))
    line = next((lines[part] for part in outward if part in lines), None)
    prefix = where if line is None else f"{where}:{line}"
    return f"{prefix}: {'.'.join(map(str, location))}" if location else prefix


def override(data: dict[str, Any], assignment: str) -> tuple[dict[str, Any], Location]:
    """A copy of a recipe's data with one ``a.b=value`` applied, and the location it set.

    The value is YAML. A stage or gate is addressed by name or position:
    ``stages.prune_blocks.drop=2``, ``gates.0.max_ratio=1.2``. Raises `BadInput` for a path that
    leads nowhere.
    """
    path, equals, text = assignment.partition("=")
    keys = path.split(".")
    where = f"--set {assignment}"
    if not equals or not all(keys):
        raise BadInput("not an override", where=where, expected="path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadInput("the value is not valid YAML", where=where) from None
    location = _item_location(data, keys, where) if keys[0] in _ITEMS else tuple(keys)
    return _with(data, location, value, where), location


def _item_location(data: dict[str, Any], keys: list[str], where: str) -> Location:
    part, kind = keys[0], _ITEMS[keys[0]]
    items = data.get(part)
    names = [
        str(next(iter(entry), None) if isinstance(entry, dict) else entry)
        for entry in (items if isinstance(items, list) else [])
    ]
    if len(keys) == 1:
        return (part,)
    if len(keys) == 2:
        raise BadInput(
            "names no option", where=where, expected=f"{part}.{kind.upper()}.option=value"
        )
    item, options = keys[1], keys[2:]
    if item.isdecimal() and int(item) < len(names):
        index = int(item)
        # Messages spell a place stages.0.NAME.option: what they print can be pasted back.
        options = options[1:] if len(options) > 1 and options[0] == names[index] else options
    elif names.count(item) == 1:
        index = names.index(item)
    elif item in names:
        raise BadInput(f"'{item}' stands more than once", where=where, mend="use its position")
    else:
        hint = did_you_mean(item, names)
        raise BadInput(f"the recipe has no {kind} '{item}'", where=where, mend=hint)
    return (part, index, names[index], *options)


def _with(node: Any, location: Location, value: Any, where: str) -> Any:
    """A copy of nested data with ``value`` at ``location``; missing mappings are made."""
    if not location:
        return value
    first, rest = location[0], location[1:]
    if isinstance(node, list) and isinstance(first, int):
        return [*node[:first], _with(node[first], rest, value, where), *node[first + 1 :]]
    if node is None or node == first:  # a stage may be written as its bare name
        node = {}
    if not isinstance(node, dict):
        raise BadInput(f"'{first}' would lie inside a plain value", where=where)
    return {**node, first: _with(node.get(first), rest, value, where)}
