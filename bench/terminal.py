"""What the benchmark commands share: mistakes told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from flexprefill_fa.loading import UsageError, first_line


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a mistake in the body into one line on stderr and exit status 2."""
    try:
        yield
    except (UsageError, ValueError) as error:
        typer.echo(f"error: {first_line(error)}", err=True)
        raise typer.Exit(2) from error
