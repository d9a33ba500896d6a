"""Rows and calibrations for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from torch import Tensor

from bench.calibrate import TARGET_DENSITY, interpolate
from flexprefill_fa.tools.rows import Row


def label(row: Row) -> str:
    """What was measured, in a few words."""
    if row["selector"] is None:
        return f"dense {row['kernel']}"
    ran = f"dense {row['kernel']}" if row["path"] == "dense" else row["kernel"]
    how = row["backend"] if row["backend"] == ran else f"{row['backend']} ({ran})"
    if row["selector"] == "synthetic":
        return f"density {row['settings']['density']:g} {how}"
    return f"{row['selector']} {how}"


def one_line(row: Row) -> str:
    """A row for a log."""
    who = f"{row['length']} tokens, {label(row)}"
    if "error" in row:
        return f"{who}: WRONG: {row['error']}"
    return f"{who}: {number(row.get('total_ms', row.get('attend_ms')), '.3f')} ms"


def number(value: Any, spec: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, spec)


def result_table(rows: Sequence[Row]) -> Table:
    """All rows of a run; times are medians in ms."""
    table = Table(title=_title(rows), title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("what")
    for name in ("density", "recall", "select", "attend", "total", "eager", "TFLOP/s", "of dense", "x SDPA", "x best"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row["length"]), f"{label(row)} WRONG" if "error" in row else label(row)]
        cells += [number(row.get(name), ".3f") for name in ("density", "recall")]
        cells += [number(row.get(name), ".3f") for name in ("select_ms", "attend_ms", "total_ms", "total_eager_ms")]
        cells += [number(row.get("tflops"), ".1f"), number(row.get("share_of_dense_tflops"), ".0%")]
        speedup = row.get("speedup_sdpa_flash", row.get("speedup_sdpa"))
        cells += [number(speedup, ".2f"), number(row.get("speedup_best_dense"), ".2f")]
        table.add_row(*cells)
    return table


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"{row['gpu']}, torch {row['torch']}, {row['dtype']}, batch {row['batch']}, {row['heads']}/{row['kv_heads']} "
        f"heads, head_dim {row['head_dim']}, {row['workload']}, ms"
    )


def calibration_table(length: int, sharpness: Sequence[float], densities: Tensor) -> Table:
    """Mean and extreme densities by sharpness, and the sharpness for the target where it lies between them.

    Args:
        length: tokens.
        sharpness: what was tried.
        densities: `[heads, len(sharpness)]`.
    """
    mean = densities.mean(0).tolist()
    target = TARGET_DENSITY.get(length)
    title = f"{length} tokens"
    if target is not None:
        try:
            title += f": density {target:g} at sharpness {interpolate(sharpness, mean, target):.4f}"
        except ValueError as error:
            title += f": {error}"
    table = Table(title=title, title_justify="left")
    for name in ("sharpness", "mean density", "lowest head", "highest head"):
        table.add_column(name, justify="right")
    low, high = densities.amin(0).tolist(), densities.amax(0).tolist()
    for row in zip(sharpness, mean, low, high, strict=True):
        table.add_row(f"{row[0]:g}", *(f"{value:.4f}" for value in row[1:]))
    return table
