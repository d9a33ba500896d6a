"""A progress bar on stderr for work that takes seconds, silent where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class WorkProgress:
    """Shows one bar at a time, gone when its work is done.

    Args:
        console: where to draw; nothing is drawn unless it is a terminal.
    """

    def __init__(self, console: Console | None = None):
        self.console = console if console is not None else Console(stderr=True)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Callable[[], None] | None]:
        """Show a bar of `total` steps (None: unknown) while the body runs.

        Yields:
            A function that advances the bar by one step, or None where nothing is drawn.
        """
        if not self.console.is_terminal:
            yield None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(label, total=total)
            yield lambda: progress.advance(bar)
