"""The gates a recipe can name. Importing this package makes them known."""

from __future__ import annotations

from compress.gates import bit_exact, divergence, lm_eval, perplexity
from compress.gates.base import Gate, GateResult, Row, Subject, get, names, recorded
from compress.gates.junit import junit_xml
from compress.gates.lm_eval import LmEvalConfig, judge
from compress.gates.run import failed, pending, plan_gates, run_gates

__all__ = [
    "Gate",
    "GateResult",
    "LmEvalConfig",
    "Row",
    "Subject",
    "bit_exact",
    "divergence",
    "failed",
    "get",
    "judge",
    "junit_xml",
    "lm_eval",
    "names",
    "pending",
    "perplexity",
    "plan_gates",
    "recorded",
    "run_gates",
]
