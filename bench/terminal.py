"""What the benchmark commands share: mistakes told in one line, and rows that are kept and told as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import typer
from rich.console import Console

from flexprefill_fa.tools import loading
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.rows import Row, append

one_line_errors = partial(loading.one_line_errors, (loading.UsageError, ValueError, OSError, torch.OutOfMemoryError))
"""As `loading.one_line_errors`, also for numbers that a workload refuses, broken rows and files that fail."""


def require_packages(*names: str) -> None:
    """Check that packages are here which the extra `bench` brings.

    Raises:
        UsageError: naming the extra to install.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            reason = loading.first_line(error)
            raise loading.UsageError(
                f"this command needs {name}: pip install 'flexprefill-fa[bench]' ({reason})"
            ) from error


def plain(console: Console) -> Callable[[str], None]:
    """Prints a line on a console as it is."""
    return partial(console.print, markup=False, soft_wrap=True)


def record(
    lengths: Iterable[int],
    rows_of: Callable[[int], Iterator[Row]],
    steps: int,
    *,
    out: Path,
    as_json: bool,
    console: Console,
    line: Callable[[Row], str],
) -> tuple[list[Row], bool]:
    """Measure each length; a length for which memory is short, or the GPU gave up, is told and left out.

    Args:
        lengths: tokens.
        rows_of: measures the rows of a length, one after the other.
        steps: rows per length.
        out: file that each row is added to.
        as_json: whether to print each on stdout too.
        console: on stderr, for a bar and a line for each row. line: what to tell of a row.

    Returns:
        The rows, and whether a length was left out.
    """
    note = plain(console)
    rows: list[Row] = []
    left_out = False
    for length in lengths:
        try:
            with WorkProgress(console).task(f"{length} tokens", steps) as advance:
                for row in rows_of(length):
                    rows.append(row)
                    append(out, row)
                    note(line(row))
                    if as_json:
                        typer.echo(json.dumps(row))
                    if advance is not None:
                        advance()
        except (loading.UsageError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            note(f"error: {length} tokens: {loading.first_line(error)}")
            left_out = True
    return rows, left_out
