"""What real models answer to the RULER tasks of `flexprefill eval`, in the words of the leaderboard."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from bench.accuracy_tables import task_tables
from flexprefill_fa.choice import DENSE
from flexprefill_fa.tools.rows import Row

ANSWERS = "ruler.jsonl"
"""Rows of `flexprefill eval` on real models, in the folder of results."""


class RealAnswers:
    """Mean accuracy over tasks, by model, selector and length."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = [row for table in task_tables(rows) for row in table.rows()]

    def lengths(self, model_sha256: str) -> list[int]:
        """Lengths in tokens at which a model was asked."""
        return sorted({row["length"] for row in self._of(model_sha256) if row["length"] is not None})

    def text(self, model_sha256: str, selector: str = DENSE, *, corrected: bool = False) -> str:
        """Mean accuracy at each length, of the setting that was asked most; a dash where not all tasks were asked.

        Empty where none was.
        """
        rows = [row for row in self._of(model_sha256) if not row["dense_layers"]]
        mine = [row for row in rows if (row["selector"], row["mean_correction"]) == (selector, corrected)]
        if not mine:
            return ""
        settings = [str(row["settings"]) for row in mine]
        asked = max(dict.fromkeys(settings), key=settings.count)
        mine = [row for row in mine if str(row["settings"]) == asked]
        return " / ".join(self._mean(mine, rows, length) for length in self.lengths(model_sha256))

    def _of(self, model_sha256: str) -> list[Row]:
        return [row for row in self._rows if row["model_sha256"] == model_sha256]

    @staticmethod
    def _mean(mine: list[Row], rows: list[Row], length: int) -> str:
        tasks = {row["task"] for row in rows if row["selector"] == DENSE and row["length"] == length}
        found = {row["task"]: row["accuracy"] for row in mine if row["length"] == length}
        return f"{statistics.fmean(found.values()):.2f}" if found and tasks <= set(found) else "-"
