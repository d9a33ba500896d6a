"""The documents' plots: time and speed-up against length; recall, output error, accuracy and KL against density."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it

from bench.accuracy_tables import sparse_rows, task_tables
from bench.fidelity_tables import sweeps
from bench.quality_points import families, labels, quality_groups
from bench.render import ACCURACY_PLOT, FIDELITY_PLOT, PLOT, QUALITY_PLOT
from bench.tables import KERNEL_NAMES, groups
from flexprefill_fa.tools.fidelity.plot import save_panels
from flexprefill_fa.tools.rows import Row, read

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

_ACROSS = 3  # axes in a row of accuracies
_KL_TEXT = "source"  # the one of the KL plot
_DENSITY_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


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


def draw_quality(results: Path) -> Path | None:
    """Recall and output error against density, one row of axes per length; None, and no file, without rows."""
    found = quality_groups(read(results / "quality.jsonl"))
    if not found:
        return None
    rows = found[0]
    lengths = sorted({row["length"] for row in rows})
    size = (11, 4.2 * len(lengths))
    figure, grid = plt.subplots(len(lengths), 2, figsize=size, layout="constrained", squeeze=False)
    for length, (recall, error) in zip(lengths, grid, strict=True):
        curves = families(rows, length)
        for number, (name, family) in enumerate(zip(labels(curves), curves, strict=True)):
            for axes, field, style in ((recall, "recall", "o-"), (error, "error", "o-"), (error, "corrected", "s--")):
                points = [
                    (point.density, value) for point in family.points if (value := getattr(point, field)) is not None
                ]
                if points:
                    shown = None if field == "corrected" else name
                    axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=shown, markersize=4)
        recall.set(ylabel="recall")
        error.set(ylabel="relative output error", yscale="log")
        for axes in (recall, error):
            axes.set(xscale="log", xlabel="density", title=f"{length:,} tokens")
            axes.set_xticks(_DENSITY_TICKS, [f"{tick:.0%}" for tick in _DENSITY_TICKS])
            axes.set_xlim(0.9 * min(row["density"] for row in rows), 1.05)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    last = grid[-1, 1]
    last.plot([], [], "s--", color="grey", label="with mean correction", markersize=4)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    row = rows[0]
    figure.suptitle(f"The needle model's heads, {row['gpu']}, {row['dtype']}; mean over layers and heads", size=10)
    path = results / QUALITY_PLOT
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_accuracy(results: Path) -> Path | None:
    """Task accuracy against density, one axes per task; None, and no file, without rows."""
    tables = task_tables(read(results / "quality.jsonl"))
    if not tables:
        return None
    across = min(len(tables), _ACROSS)
    down = math.ceil(len(tables) / across)
    figure, grid = plt.subplots(down, across, figsize=(5.5 * across, 4.2 * down), layout="constrained", squeeze=False)
    for spare in grid.flat[len(tables) :]:
        spare.set_axis_off()
    found = [row for table in tables for row in sparse_rows(table)]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["selector"] for row in found))}
    markers = dict(zip(sorted({row["length"] or 0 for row in found}), itertools.cycle("os^Dv*"), strict=False))
    for table, axes in zip(tables, grid.flat, strict=False):
        here = sparse_rows(table)
        for row in here:
            style = {"marker": markers[row["length"] or 0], "color": colours[row["selector"]]}
            hollow = {"markerfacecolor": "none"} if row["dense_layers"] else {}
            axes.plot(row["density"], row["accuracy"], markersize=5, alpha=0.8, **style, **hollow)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=table.title, xlabel="density", ylabel="accuracy", xscale="log", ylim=(-0.03, 1.05))
        axes.set_xticks(_DENSITY_TICKS, [f"{tick:.0%}" for tick in _DENSITY_TICKS])
        axes.set_xlim(0.9 * min((row["density"] for row in here), default=0.1), 1.1)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    last = grid[0, 0]
    for name, colour in colours.items():
        last.plot([], [], "o", color=colour, label=name)
    for length, marker in markers.items():
        last.plot([], [], marker, color="grey", label=f"{length:,} tokens" if length else "its own prompts")
    if any(row["dense_layers"] for row in found):
        last.plot([], [], "o", color="grey", markerfacecolor="none", label="with dense layers")
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    row = tables[0].rows()[0]
    figure.suptitle(f"{row['model']}, {row['gpu']}, {row['dtype']}, {row['samples']} samples a point", size=10)
    path = results / ACCURACY_PLOT
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_fidelity(results: Path) -> Path | None:
    """KL against density on source code, one axes per model and length; None, and no file, without rows."""
    groups_of_text = [group for group in sweeps(read(results / "fidelity.jsonl")) if group[0]["text"] == _KL_TEXT]
    panels: dict[str, list[Row]] = {}
    for row in sorted(itertools.chain(*groups_of_text), key=lambda row: (row["model"], row["length"])):
        panels.setdefault(f"{row['model']}, {row['length']:,} tokens", []).append(row)
    if not panels:
        return None
    row = groups_of_text[0][0]
    path = results / FIDELITY_PLOT
    save_panels(panels, f"Real models on the text '{_KL_TEXT}', {row['gpu']}, {row['dtype']}", path)
    return path
