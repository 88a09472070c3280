"""Proofs and measurements of finished checkpoints."""

from __future__ import annotations

from compress.evaluate.doctor import Finding, diagnose
from compress.evaluate.inspect import Inspection, SizeRow, inspect
from compress.evaluate.perplexity import perplexity
from compress.evaluate.verify import VerifyReport, verify

__all__ = [
    "Finding",
    "Inspection",
    "SizeRow",
    "VerifyReport",
    "diagnose",
    "inspect",
    "perplexity",
    "verify",
]
