"""Time and speed-up against length, as bench/results/attention.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it

from bench.render import PLOT
from bench.rows import Row, read
from bench.tables import KERNEL_NAMES, groups

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]


def draw_attention(results: Path) -> Path | None:
    """Draw the first table's rows; None, and no file, where there are none."""
    found = groups(read(results / "attention.jsonl"), "cuda", "sharpened", synthetic=False)
    if not found:
        return None
    dense, selected = found[0]
    figure, (time, speedup) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kernel, style in (("sdpa_flash", ":"), ("sdpa_cudnn", "-."), ("FLASH", "--")):
        rows = [row for row in dense if row["kernel"] == kernel]
        _line(time, rows, "total_ms", f"dense: {KERNEL_NAMES[kernel]}", "grey", style)
    for backend, colour in (("FLASH", "C0"), ("TRITON", "C1")):
        rows = [row for row in selected if row["backend"] == backend]
        _line(time, rows, "total_ms", f"sparse, {backend}", colour, "o-")
        _line(speedup, rows, "speedup_sdpa_flash", f"{backend} over SDPA flash", colour, "o-")
        _line(speedup, rows, "speedup_best_dense", f"{backend} over the best dense kernel", colour, "s--")
    rows = [row for row in selected if row["backend"] == "auto"]
    _line(time, rows, "total_ms", "auto", "black", "x")
    _line(speedup, rows, "speedup_best_dense", "auto over the best dense kernel", "black", "x")
    time.set_ylabel("ms, selection included")
    speedup.set_ylabel("speed-up")
    speedup.axhline(1, color="grey", linewidth=0.8)
    for axes in (time, speedup):
        axes.set(xscale="log", yscale="log", xlabel="prompt length, tokens")
        lengths = sorted({row["length"] for row in selected})
        axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    row = selected[0]
    figure.suptitle(
        f"{row['gpu']}, {row['dtype']}, batch {row['batch']}, {row['heads']}/{row['kv_heads']} heads", size=10
    )
    path = results / PLOT
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _line(axes: Any, rows: list[Row], field: str, name: str, colour: str, style: str) -> None:
    points = sorted((row["length"], row[field]) for row in rows if row.get(field) is not None)
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=5)
