"""The command line: parse, call, print. Exit codes are those of `compress.errors`."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compress import __version__
from compress.console import Cli, Console, progress, size
from compress.errors import BadInput, Missing, did_you_mean
from compress.options import (
    junit_option,
    options,
    overwrite_option,
    resume_option,
    revision_option,
    verbose_option,
)
from compress.proof_commands import check_junit, end_with_gates, evaluate, report, say_gates, verify

if TYPE_CHECKING:
    from compress import pipeline


def main() -> None:
    """Entry point of `entropress` and of cli.py."""
    # A reader that goes away ends us as it ends any command, rather than as a failed check.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # transformers draws bars of its own, and logs what we check ourselves.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cli(prog_name="entropress")


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="entropress")
@verbose_option
def cli() -> None:
    """Compress neural networks by entropy.

    MODEL is a directory, a hub id, or demo:smollm2-135m or demo:minilm. Exit codes: 0 done, 1 a
    check failed, 2 bad input, 3 something is missing here, 70 a bug.
    """


for command in (verify, evaluate, report):
    cli.add_command(command)


@cli.command()
@options(
    click.option("--recipe", required=True, help="A YAML file, or the name of a shipped recipe."),
    click.option("--output-dir", help="Default: MODEL-RECIPE in the working directory."),
    click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override."),
    click.option("--dry-run", is_flag=True, help="Say what would be done and the output's size."),
    click.option("--threads", type=click.IntRange(1), help="Default: all cores."),
    junit_option,
    resume_option,
    overwrite_option,
    revision_option,
)
@click.argument("model")
@click.pass_context
def compress(
    ctx: click.Context,
    model: str,
    recipe: str,
    output_dir: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    threads: int | None,
    junit: str | None,
    resume: bool,
    overwrite: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Run a recipe on MODEL, publish the outcome, and exit with 1 if a gate did not pass."""
    from compress import pipeline
    from compress import recipe as recipes

    check_junit(junit)
    console, chosen = Console(as_json), recipes.load(recipe, overrides)
    output = output_dir or f"{base_name(model)}-{chosen.name}"
    if dry_run:
        with progress() as bars:
            planned = pipeline.plan(chosen, model, revision=revision, progress=bars)
        for stage in planned.stages:
            console.say(f"{stage.stage}: {', '.join(stage.changes)}")
        console.say(change(planned.bytes_in, planned.bytes_out) + " (tensors, predicted)")
        console.document(asdict(planned))
        return
    ctx.meta["interrupted"] = "interrupted; the same command with --resume continues"
    with progress() as bars:
        result = pipeline.run(
            chosen,
            model,
            output,
            resume=resume,
            overwrite=overwrite,
            revision=revision,
            threads=threads,
            progress=bars,
        )
    for stage in result.manifest["stages"]:
        console.say(f"{stage['stage']}: {stage['summary']}")
    kind = result.manifest["class"]
    console.say(f"{output}: {change(result.bytes_in, result.bytes_out)}, {kind}")
    say_gates(console, result.gates)
    console.document(
        {
            "path": output,
            "class": kind,
            "bytes_in": result.bytes_in,
            "bytes_out": result.bytes_out,
            "recipe": result.manifest["recipe"],
            "stages": result.manifest["stages"],
            "gates": result.manifest["gates"],
        }
    )
    end_with_gates(result.gates, output, junit)


@cli.command()
@options(
    click.option("--signals", help="Scorers by commas, or all; default: the four cheap ones."),
    click.option(
        "--granularity",
        default="block",
        type=click.Choice(["block", "attention", "mlp"]),
        help="What of each block to score; default: all of it.",
    ),
    click.option("--drop", default=1, type=click.IntRange(1), help="For how firm the choice is."),
    click.option("--plot", metavar="FILE", help="Draw the scores, as .png or .svg."),
    click.option("--data", default="builtin:calibration", help="Text to read: .txt or .jsonl."),
    click.option("--sequences", default=32, type=click.IntRange(1), help="Windows of text."),
    click.option("--length", default=512, type=click.IntRange(8), help="Tokens in each."),
    click.option("--seed", default=0, help="Which windows."),
    revision_option,
)
@click.argument("model")
def measure(
    model: str,
    signals: str | None,
    granularity: pipeline.Granularity,
    drop: int,
    plot: str | None,
    data: str,
    sequences: int,
    length: int,
    seed: int,
    revision: str | None,
    as_json: bool,
) -> None:
    """Score the blocks of MODEL by every signal, and say which signals agree."""
    from compress import pipeline
    from compress.report import check_picture, write_picture
    from compress.signals import SCORERS, SCORERS_DEFAULT
    from compress.stages import Calibration

    known = {None: SCORERS_DEFAULT, "all": SCORERS}
    chosen = known[signals] if signals in known else tuple((signals or "").split(","))
    for name in chosen:
        if name not in SCORERS:
            raise BadInput(f"unknown signal '{name}'", mend=did_you_mean(name, SCORERS))
    if plot:
        check_picture(Path(plot))
    console = Console(as_json)
    text = Calibration(data=data, sequences=sequences, length=length, seed=seed)
    with progress() as bars:
        found = pipeline.measure(
            model,
            text,
            scorers=chosen,
            drop=drop,
            granularity=granularity,
            revision=revision,
            progress=bars,
        )
    console.table(found.header, found.rows())
    for pair, rho in found.agreement().items():
        value = "undefined" if rho is None else f"{rho:+.2f}"
        agrees = ", they agree" if pair in found.agreeing() else ""
        console.say(f"rank correlation {pair}: {value}{agrees}")
    for name, stable in found.stability().items():
        if stable:
            share = f"{100 * stable.same_choice:.0f} %"
            console.say(f"{name}: {share} of resamples would remove the same {drop}")
    if plot:
        write_picture(found, Path(plot))
        console.say(f"wrote {plot}")
    console.document(found.to_json())


@cli.command()
@options(
    click.option(
        "--entropy/--no-entropy", default=True, help="Read all tensors for the entropies."
    ),
    revision_option,
)
@click.argument("path", metavar="MODEL")
def inspect(path: str, entropy: bool, revision: str | None, as_json: bool) -> None:
    """Show sizes, bits per weight and exponent entropy of MODEL, compressed or not."""
    from compress.evaluate.inspect import inspect as look

    console = Console(as_json)
    with progress() as bars:
        found = look(path, revision=revision, entropy=entropy, progress=bars)
    for title, rows in (("dtype", [*found.dtypes, found.total]), ("kind", found.kinds)):
        header = (title, "tensors", "weights", "bytes", "stored", "bits/weight", "exponent bits")
        console.table(
            header,
            [
                (
                    row.group,
                    row.tensors,
                    f"{row.weights:,}",
                    f"{row.nbytes:,}",
                    f"{row.stored_nbytes:,}",
                    f"{row.bits_per_weight:.3f}",
                    "-" if row.exponent_bits is None else f"{row.exponent_bits:.3f}",
                )
                for row in rows
            ],
        )
        console.say()
    if found.manifest:
        source = found.manifest["source"]
        revision = f" ({source['revision']})" if source["revision"] else ""
        console.say(f"{found.manifest['class']}, made from {source['id']}{revision}")
        for stage in found.manifest["stages"]:
            console.say(f"{stage['stage']}: {stage['summary']}")
        for gate in found.manifest["gates"]:
            console.say(f"gate {gate['gate']}: {gate['verdict'].upper()}: {gate['summary']}")
    console.say(f"{size(found.file_nbytes)} in all files")
    console.document(asdict(found))


@cli.command()
@options(resume_option, overwrite_option)
@click.argument("path")
@click.argument("out")
@click.pass_context
def decompress(
    ctx: click.Context, path: str, out: str, resume: bool, overwrite: bool, as_json: bool
) -> None:
    """Write the dense checkpoint that PATH stands for to OUT."""
    from compress import pipeline

    console = Console(as_json)
    ctx.meta["interrupted"] = "interrupted; the same command with --resume continues"
    with progress() as bars:
        pipeline.decompress(path, out, resume=resume, overwrite=overwrite, progress=bars)
    console.say(f"{out}: decompressed")
    console.document({"path": out})


@cli.command()
@click.option("--gpu", is_flag=True, help="Also compile the CUDA kernels and test them.")
@options()
def doctor(gpu: bool, as_json: bool) -> None:
    """Say what this installation has and lacks; exit with 3 if something needed is missing."""
    from compress.evaluate.doctor import diagnose

    console = Console(as_json)
    with progress() as bars:
        findings = diagnose(gpu, bars)
    marks = {True: "ok", False: "MISSING", None: "absent"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mend = "" if finding.ok or not finding.mend else f"; {finding.mend}"
        console.say(f"{finding.name.ljust(width)}  {marks[finding.ok]:<7}  {finding.detail}{mend}")
    console.document({finding.name: asdict(finding) for finding in findings})
    for finding in findings:
        if finding.ok is False:
            raise Missing(f"{finding.name}: {finding.detail}", mend=finding.mend)


def base_name(model: str) -> str:
    """The last part of a path, hub id or demo name."""
    name = Path(model).absolute().name if Path(model).is_dir() else re.split("[/:]", model)[-1]
    if not name:
        raise BadInput("no name for the output", where=model, mend="give --output-dir")
    return name


def change(before: int, after: int) -> str:
    return f"{size(before)} → {size(after)} ({100 * after / max(1, before):.2f} %)"
