"""JUnit XML that CI systems read."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from compress.gates import GateResult, Row, junit_xml

ROW = Row(name="x", value=2.0, limit=1.0, verdict="failed")
RESULTS = [
    GateResult(gate="bit_exact", config={}, verdict="passed", summary="every bit the same"),
    GateResult(gate="lm_eval", config={}, verdict="failed", summary="1 too much", rows=[ROW]),
    GateResult(gate="perplexity", config={}, verdict="undecided", summary="who knows"),
]


def test_whatever_has_not_passed_is_a_failure() -> None:
    suite = ElementTree.fromstring(junit_xml(RESULTS, "out"))
    assert suite.attrib["tests"] == "3"
    assert suite.attrib["failures"] == "2"
    failures = {case.attrib["name"]: case.find("failure") for case in suite}
    assert failures["bit_exact"] is None
    assert failures["lm_eval"].attrib["message"] == "1 too much"
    assert "'limit': 1.0" in failures["lm_eval"].text
    assert failures["perplexity"].attrib["type"] == "undecided"


@given(st.text())
def test_any_text_makes_valid_xml(text: str) -> None:
    result = GateResult(gate="lm_eval", config={}, verdict="failed", summary=text)
    suite = ElementTree.fromstring(junit_xml([result], text))
    assert suite.attrib["failures"] == "1"
