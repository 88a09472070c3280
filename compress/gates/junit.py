"""Gate results as JUnit XML, which every CI system shows."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from compress.gates.base import GateResult


def junit_xml(results: Sequence[GateResult], suite: str) -> bytes:
    """One test case a gate; whatever has not passed is a failure. UTF-8."""
    failed = [result for result in results if result.verdict != "passed"]
    root = ElementTree.Element(
        "testsuite",
        name=_printable(suite),
        tests=str(len(results)),
        failures=str(len(failed)),
        errors="0",
        skipped="0",
    )
    for result in results:
        case = ElementTree.SubElement(
            root, "testcase", classname="entropress.gates", name=_printable(_name(result))
        )
        if result.verdict != "passed":
            failure = ElementTree.SubElement(
                case, "failure", type=result.verdict, message=_printable(result.summary)
            )
            failure.text = "\n".join(_printable(str(row.model_dump())) for row in result.rows)
        ElementTree.SubElement(case, "system-out").text = _printable(result.summary)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _name(result: GateResult) -> str:
    """The gate with its tasks: a recipe may have several of one kind."""
    return " ".join([result.gate, *map(str, result.config.get("tasks") or [])])


def _printable(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return "".join(
        char
        for char in text
        if char in "\t\n\r"
        or " " <= char <= "\ud7ff"
        or "\ue000" <= char <= "\ufffd"
        or char > "\uffff"
    )
