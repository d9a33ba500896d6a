"""What the benchmark commands share: tables wide enough for a log, mistakes told in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from flexprefill_fa.loading import UsageError, first_line

_LOG_WIDTH = 140  # of the table where there is no terminal


def open_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else _LOG_WIDTH
    return Console(stderr=stderr, highlight=False, width=wide)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a mistake in the body into one line on stderr and exit status 2."""
    try:
        yield
    except (UsageError, ValueError) as error:
        typer.echo(f"error: {first_line(error)}", err=True)
        raise typer.Exit(2) from error
