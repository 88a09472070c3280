"""Proofs and measurements of finished checkpoints."""

from __future__ import annotations

from compress.evaluate.bootstrap import FEWEST, Interval, Verdict, bootstrap_interval
from compress.evaluate.divergence import Divergence, divergence
from compress.evaluate.doctor import Finding, diagnose
from compress.evaluate.doctor_gpu import driver_version
from compress.evaluate.documents import (
    Documents,
    check_causal,
    check_same_tokens,
    read_documents,
)
from compress.evaluate.harness import (
    EvalOptions,
    Evaluation,
    check_device,
    reference_journal,
    run_tasks,
    save,
)
from compress.evaluate.identity import model_identity
from compress.evaluate.inspect import Inspection, SizeRow, inspect, kind
from compress.evaluate.likelihood import losses, perplexity, perplexity_ratio
from compress.evaluate.paired import Comparison, compare, documents_needed
from compress.evaluate.pairing import TaskComparison, compare_tasks, same_responses
from compress.evaluate.processor import load_processor
from compress.evaluate.tasks import check_metric, check_sees, load_tasks
from compress.evaluate.verify import VerifyReport, verify

__all__ = [
    "FEWEST",
    "Comparison",
    "Divergence",
    "Documents",
    "EvalOptions",
    "Evaluation",
    "Finding",
    "Inspection",
    "Interval",
    "SizeRow",
    "TaskComparison",
    "Verdict",
    "VerifyReport",
    "bootstrap_interval",
    "check_causal",
    "check_device",
    "check_metric",
    "check_same_tokens",
    "check_sees",
    "compare",
    "compare_tasks",
    "diagnose",
    "divergence",
    "documents_needed",
    "driver_version",
    "inspect",
    "kind",
    "load_processor",
    "load_tasks",
    "losses",
    "model_identity",
    "perplexity",
    "perplexity_ratio",
    "read_documents",
    "reference_journal",
    "run_tasks",
    "same_responses",
    "save",
    "verify",
]
