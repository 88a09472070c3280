"""The commands that prove things: verify, eval, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.console import Console, progress, size
from compress.errors import BadInput, CheckFailed
from compress.options import junit_option, options, revision_option

if TYPE_CHECKING:
    from compress.gates import GateResult, Row

DTYPES = ("auto", "float32", "float16", "bfloat16")


@click.command()
@options(
    click.option("--against", metavar="MODEL", help="Also compare with the original."),
    revision_option,
)
@click.argument("path")
def verify(path: str, against: str | None, revision: str | None, as_json: bool) -> None:
    """Check every byte of PATH; exit with 1 if one is wrong."""
    from compress.evaluate import verify as check

    console = Console(as_json)
    with progress() as bars:
        report = check(path, against, revision=revision, progress=bars)
    for fault in report.faults:
        console.say(fault)
    for title, names in (
        (f"removed from {report.against}", report.dropped),
        ("not compared, since a stage changed them", report.not_compared),
    ):
        if names:
            console.say(f"{title}: {len(names)} tensors, {names[0]} first")
    console.document({"ok": report.ok, **asdict(report)})
    if not report.ok:
        raise CheckFailed(f"{len(report.faults)} faults, {report.faults[0]} first", where=path)
    console.say(
        f"{path}: {report.tensors} tensors ({size(report.nbytes)}) and {report.files} files "
        "are sound"
    )
    if against:
        equal = report.tensors - len(report.not_compared)
        console.say(f"{equal} tensors equal those of {report.against} bit for bit")


@click.command("eval")
@options(
    click.option(
        "--tasks", help="lm-eval tasks and groups, by commas; those shipped: entropress_suite."
    ),
    click.option("--include-path", metavar="DIR", help="A directory of more lm-eval task files."),
    click.option("--limit", type=float, help="Documents a task; below 1 a share of them."),
    click.option("--num-fewshot", type=click.IntRange(0), help="Examples in each prompt."),
    click.option("--batch-size", default=8, type=click.IntRange(1), show_default=True),
    click.option("--apply-chat-template", is_flag=True, help="Put prompts into the chat template."),
    click.option("--baseline", metavar="MODEL", help="Compare with it, document by document."),
    click.option("--max-drop", type=click.FloatRange(0), help="Gate: allowed loss on each task."),
    click.option("--metric", help="What --max-drop is about; default: each task's first."),
    click.option("--confidence", default=0.95, type=click.FloatRange(0.5, 1, True, True)),
    click.option("--recipe", help="Also check the gates of this recipe."),
    click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override in it."),
    click.option("--dtype", default="auto", type=click.Choice(DTYPES), help="To compute in."),
    click.option("--device", default="auto", help="As torch names it; auto: CUDA if there is any."),
    click.option("--output", metavar="DIR", help="Write lm-eval's result files there."),
    click.option("--log-samples", is_flag=True, help="With them, every document and answer."),
    click.option("--record", is_flag=True, help="Put the gates' results into PATH's manifest."),
    junit_option,
    revision_option,
)
@click.argument("path", metavar="MODEL")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    path: str,
    tasks: str | None,
    include_path: str | None,
    limit: float | None,
    num_fewshot: int | None,
    batch_size: int,
    apply_chat_template: bool,
    dtype: str,
    device: str,
    junit: str | None,
    as_json: bool,
    **proof_options: Any,
) -> None:
    """Evaluate MODEL on lm-eval tasks, compare it with a baseline, check gates on it.

    Without --max-drop and --recipe nothing can fail but the evaluation itself. Interrupted, the
    same command continues where it was.
    """
    from compress.evaluate import EvalOptions
    from compress.proof import prove

    check_junit(junit)
    console = Console(as_json)
    asked = EvalOptions(
        tasks=tuple(name for name in (tasks or "").split(",") if name),
        include_path=include_path,
        limit=int(limit) if limit is not None and limit.is_integer() else limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        dtype=dtype,
        device=device,
    )
    ctx.meta["interrupted"] = "interrupted; the same command continues"
    with progress() as bars:
        proof = prove(path, asked if asked.tasks else None, progress=bars, **proof_options)
    if proof.evaluation:
        say_scores(console, proof.evaluation.results)
    if proof.comparisons:
        console.say(f"against {proof.baseline}, document by document:")
        say_rows(console, proof.comparisons)
    say_gates(console, proof.gates)
    for file in proof.files:
        console.say(f"wrote {file}")
    console.document(
        {
            "path": path,
            "baseline": proof.baseline,
            "results": scores(proof.evaluation.results) if proof.evaluation else None,
            "comparisons": [
                row.model_dump(exclude={"limit", "verdict"}) for row in proof.comparisons
            ],
            "gates": [gate.model_dump() for gate in proof.gates],
            "files": proof.files,
        }
    )
    end_with_gates(proof.gates, path, junit)


@click.command()
@options(click.option("--output", metavar="DIR", help="Default: into PATH itself."))
@click.argument("path")
def report(path: str, output: str | None, as_json: bool) -> None:
    """Write what PATH is and what was proved about it: report.html, and README.md as model card."""
    from compress.report import write_report

    console = Console(as_json)
    with progress() as bars:
        files = write_report(Path(path), Path(output) if output else None, progress=bars)
    for file in files:
        console.say(f"wrote {file}")
    console.document({"files": files})


def say_scores(console: Console, results: dict[str, Any]) -> None:
    """lm-eval's table: a line per metric of each task."""
    rows = [
        (
            task,
            results["n-samples"].get(task, {}).get("effective", ""),
            name.removesuffix(",none"),
            number(value),
            number(metrics.get(name.replace(",", "_stderr,", 1))),
        )
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    ]
    console.table(("task", "documents", "metric", "value", "stderr"), rows)


def scores(results: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results without the documents and without what it knows of this machine."""
    kept = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")
    return {key: results[key] for key in kept if key in results}


def say_rows(console: Console, rows: Sequence[Row]) -> None:
    console.table(
        ("what", "baseline", "here", "difference", "interval", "documents"),
        [
            (
                row.name,
                number(row.reference),
                number(row.candidate),
                number(row.value),
                f"[{number(row.low)}, {number(row.high)}]",
                row.documents or "",
            )
            for row in rows
        ],
    )


def number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "?"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def say_gates(console: Console, results: Sequence[GateResult]) -> None:
    for gate in results:
        console.say(f"gate {gate.gate}: {gate.verdict.upper()}: {gate.summary}")


def check_junit(junit: str | None) -> None:
    """Refuse a place that cannot be written, before hours of work and not after."""
    if junit and (Path(junit).is_dir() or not os.access(Path(junit).absolute().parent, os.W_OK)):
        raise BadInput("cannot be written", where=junit, mend="name a file in a directory")


def end_with_gates(results: Sequence[GateResult], where: str, junit: str | None) -> None:
    """Write the JUnit file, and exit with 1 unless every gate passed."""
    from compress.checkpoint import write_atomic
    from compress.gates import junit_xml

    if junit:
        write_atomic(Path(junit), junit_xml(results, where))
    left = [gate for gate in results if gate.verdict != "passed"]
    if left:
        names = ", ".join(f"{gate.gate} {gate.verdict}" for gate in left)
        raise CheckFailed(f"{len(left)} of {len(results)} gates did not pass: {names}", where=where)
