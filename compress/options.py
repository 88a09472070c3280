"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def _verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["verbose"] = ctx.meta.get("verbose", False) or value


def verbose_option(command: Command) -> Command:
    option = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_verbose,
        help="Show the traceback of an error.",
    )
    return option(command)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options, and those that every command has."""
    common = (click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),)

    def decorate(command: Command) -> Command:
        for decorator in (verbose_option, *common, *reversed(decorators)):
            command = decorator(command)
        return command

    return decorate


revision_option = click.option("--revision", help="Branch, tag or commit of a hub model.")
resume_option = click.option("--resume", is_flag=True, help="Continue an interrupted run.")
junit_option = click.option(
    "--junit", metavar="FILE", help="Write the gates' results as JUnit XML, for CI."
)
overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an existing output, or start an unfinished one again.",
)
