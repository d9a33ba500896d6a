"""What the benchmark commands share: mistakes told in one line, and rows that are kept and told as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import typer
from rich.console import Console

from bench.tables import line_of
from flexprefill_fa.tools import loading
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, drop_unfinished, require_appendable

one_line_errors = partial(loading.one_line_errors, (loading.UsageError, ValueError, OSError, torch.OutOfMemoryError))
"""As `loading.one_line_errors`, also for numbers that a workload refuses, broken rows and files that fail."""


class Recorder:
    """Measured `rows`: each is added to a file, told in a line on stderr and, where asked for, printed as JSON.

    `wrong` says whether an output was, `incomplete` whether something could not be measured. Without a file `out` the
    rows are no results; where it is `quiet`, another process keeps and tells the same.
    """

    def __init__(self, out: Path | None, as_json: bool, *, quiet: bool = False) -> None:
        self.rows: list[Row] = []
        self.wrong = self.incomplete = False
        self._out, self._as_json = (None, False) if quiet else (out, as_json)
        if self._out is not None:
            require_appendable(self._out)
            drop_unfinished(self._out)  # of a run that was stopped: this one goes on from there
        self._console = Console(quiet=True) if quiet else open_console(stderr=True)
        self.note: Callable[[str], None] = partial(self._console.print, markup=False, soft_wrap=True)

    def each(self, lengths: Iterable[int], steps: int | None, rows: Callable[[int], Iterable[Row]]) -> None:
        """As `take` for each length in tokens, of which `rows` makes the rows."""
        for length in lengths:
            self.take(f"{length} tokens", steps, partial(rows, length))

    def take(self, label: str, steps: int | None, rows: Callable[[], Iterable[Row]]) -> None:
        """Measure, row by row; where memory is short, or the GPU gave up, that is told and the rest is left out.

        The label says what is measured, `steps` how many rows that is, where it is known.
        """
        try:
            with WorkProgress(self._console).task(label, steps) as advance:
                for row in rows():
                    self.rows.append(row)
                    if self._out is not None:
                        append(self._out, row)
                    self.note(line_of(row))
                    if self._as_json:
                        typer.echo(json.dumps(row))
                    if advance is not None:
                        advance()
        except (loading.UsageError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            told = error if isinstance(error, loading.UsageError) else loading.first_line(error)
            typer.echo(f"error: {label}: {told}", err=True)
            self.incomplete = True

    def failed(self, line: str) -> None:
        """Tell that something was wrong which has no row."""
        self.wrong = True
        self.note(line)

    def finish(self, table: str) -> None:
        """Print a table of the rows; exit with 1 for a wrong output and with 2 where something could not run."""
        if table and not self._console.quiet:
            typer.echo(table, err=self._as_json)
        if self.wrong or self.incomplete:
            raise typer.Exit(1 if self.wrong else 2)
