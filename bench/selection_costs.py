"""What it takes to select blocks, beside what the selection is worth: milliseconds by selector and length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.tables import conditions, measured
from flexprefill_fa.tools.rows import Row, latest

LENGTHS = (32_768, 131_072)
"""Tokens."""
_SHAPE = {"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
_WORKLOAD = "sharpened"


@dataclass(frozen=True)
class SelectionCosts:
    """Rows of `python -m bench attention` that timed a selection, the latest of each selector and length."""

    rows: dict[tuple[str, int], Row]

    def milliseconds(self, selector: str, length: int) -> float | None:
        """To select once, for all heads of a layer; None where it was not timed."""
        row = self.rows.get((selector, length))
        return None if row is None else row["select_ms"]

    def conditions(self) -> str:
        """What they were timed on, in one sentence; empty without rows."""
        if not self.rows:
            return ""
        settings = {name: _told(row) for (name, _), row in self.rows.items()}
        told = "; ".join(f"{name} with {text}" for name, text in settings.items())
        return f"Selection in ms, for all heads of one layer: {told}. {conditions(list(self.rows.values()))}."


def _told(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["settings"].items() if value is not None)


def selection_costs(rows: Iterable[Row]) -> SelectionCosts:
    """Of the benchmark's own shape, on a GPU."""
    found: dict[tuple[str, int], Row] = {}
    for row in latest(rows, measured):
        shape = all(row.get(name) == value for name, value in _SHAPE.items())
        if row["selector"] in (None, "synthetic") or row.get("select_ms") is None or not shape:
            continue
        if row["device"] == "cuda" and row["workload"] == _WORKLOAD and row["length"] in LENGTHS:
            found[row["selector"], row["length"]] = row
    return SelectionCosts(found)
