"""The documents' plots: time and speed-up against length; recall, output error, accuracy and KL against density."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it

from bench.accuracy_tables import cells_of, title_of
from bench.quality_tables import families
from bench.tables import KERNEL_NAMES, split, values
from flexprefill_fa.choice import DENSE
from flexprefill_fa.tools.fidelity.plot import save_panels
from flexprefill_fa.tools.rows import Row

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

_ACROSS = 3  # axes in a row of accuracies
_DENSITY_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def _axes(down: int, across: int, width: float) -> tuple[Any, Any]:
    """A figure, and its axes `[down, across]`."""
    return plt.subplots(down, across, figsize=(width * across, 4.2 * down), layout="constrained", squeeze=False)


def _ticks(axes: Any, places: Any, names: list[str]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, names)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _against_density(axes: Any, least: float, most: float, **settings: Any) -> None:
    axes.set(xlabel="density", **settings)
    _ticks(axes, _DENSITY_TICKS, [f"{tick:.0%}" for tick in _DENSITY_TICKS])
    axes.set_xlim(0.9 * least, most)


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_attention(rows: list[Row], path: Path) -> None:
    """Time and speed-up against the length."""
    dense, selected = split(rows)
    figure, ((time, speedup),) = _axes(1, 2, 5.5)

    def line(axes: Any, members: list[Row], field: str, name: str, colour: str, style: str) -> None:
        points = sorted((row["length"], row[field]) for row in members if row.get(field) is not None)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=5)

    for kernel, style in (("sdpa_flash", ":"), ("sdpa_cudnn", "-."), ("FLASH", "--")):
        members = [row for row in dense if row["kernel"] == kernel]
        line(time, members, "total_ms", f"dense: {KERNEL_NAMES[kernel]}", "grey", style)
    for backend, colour in (("FLASH", "C0"), ("TRITON", "C1")):
        members = [row for row in selected if row["backend"] == backend]
        line(time, members, "total_ms", f"sparse, {backend}", colour, "o-")
        line(speedup, members, "speedup_sdpa_flash", f"{backend} over SDPA flash", colour, "o-")
        line(speedup, members, "speedup_best_dense", f"{backend} over the best dense kernel", colour, "s--")
    members = [row for row in selected if row["backend"] == "auto"]
    line(time, members, "total_ms", "auto", "black", "x")
    line(speedup, members, "speedup_best_dense", "auto over the best dense kernel", "black", "x")
    time.set_ylabel("ms, selection included")
    speedup.set_ylabel("speed-up")
    speedup.axhline(1, color="grey", linewidth=0.8)
    lengths = values(selected, "length")
    for axes in (time, speedup):
        axes.set(yscale="log", xlabel="prompt length, tokens")
        _ticks(axes, lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
        axes.legend(fontsize=8)
    row = selected[0]
    what = f"{row['gpu']}, {row['dtype']}, batch {row['batch']}, {row['heads']}/{row['kv_heads']} heads"
    _save(figure, what, path)


def draw_quality(groups: list[list[Row]], path: Path) -> None:
    """Recall and output error of the first group against density, a row of axes per length."""
    group = groups[0]
    lengths = values(group, "length")
    figure, grid = _axes(len(lengths), 2, 5.5)
    for length, (recall, error) in zip(lengths, grid, strict=True):
        for number, (name, family) in enumerate(families(group, length).items()):
            for axes, field, style in ((recall, "recall", "o-"), (error, "error", "o-"), (error, "corrected", "s--")):
                points = [(point.density, getattr(point, field)) for point in family.points]
                points = [point for point in points if point[1] is not None]
                if points:
                    shown = None if field == "corrected" else name
                    axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=shown, markersize=4)
        least = min(row["density"] for row in group)
        _against_density(recall, least, 1.05, title=f"{length:,} tokens", ylabel="recall")
        _against_density(error, least, 1.05, title=f"{length:,} tokens", ylabel="relative output error", yscale="log")
    last = grid[-1, 1]
    last.plot([], [], "s--", color="grey", label="with mean correction", markersize=4)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    row = group[0]
    _save(figure, f"The needle model's heads, {row['gpu']}, {row['dtype']}; mean over layers and heads", path)


def draw_accuracy(groups: list[list[Row]], path: Path) -> None:
    """Task accuracy against density, axes for each task."""
    tables = [list(cells_of(group).values()) for group in groups]
    across = min(len(tables), _ACROSS)
    figure, grid = _axes(math.ceil(len(tables) / across), across, 5.5)
    for spare in grid.flat[len(tables) :]:
        spare.set_axis_off()
    sparse = [[row for row in table if row["selector"] != DENSE] for table in tables]
    found = [row for table in sparse for row in table]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["selector"] for row in found))}
    markers = dict(zip(values(found, "length"), itertools.cycle("os^Dv*"), strict=False))
    for table, here, axes in zip(tables, sparse, grid.flat, strict=False):
        for row in here:
            style = {"marker": markers[row["length"]], "color": colours[row["selector"]]}
            hollow = {"markerfacecolor": "none"} if row["dense_layers"] else {}
            axes.plot(row["density"], row["accuracy"], markersize=5, alpha=0.8, **style, **hollow)
        axes.axhline(1, color="grey", linewidth=0.8)
        least = min((row["density"] for row in here), default=0.1)
        _against_density(axes, least, 1.1, title=title_of(table[0]), ylabel="accuracy", ylim=(-0.03, 1.05))
    last = grid[0, 0]
    for name, colour in colours.items():
        last.plot([], [], "o", color=colour, label=name)
    for length, marker in markers.items():
        last.plot([], [], marker, color="grey", label=f"{length:,} tokens" if length else "its own prompts")
    if any(row["dense_layers"] for row in found):
        last.plot([], [], "o", color="grey", markerfacecolor="none", label="with dense layers")
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    row = tables[0][0]
    _save(figure, f"{row['model']}, {row['gpu']}, {row['dtype']}, {row['samples']} samples a point", path)


def draw_fidelity(groups: list[list[Row]], path: Path) -> None:
    """KL against density, axes for each model and length."""
    found = [row for group in groups for row in group]
    panels: dict[str, list[Row]] = {}
    for row in sorted(found, key=lambda row: (row["model"], row["length"])):
        panels.setdefault(f"{row['model']}, {row['length']:,} tokens", []).append(row)
    row = found[0]
    gpus = ", ".join(dict.fromkeys(row["gpu"] for rows in panels.values() for row in rows))
    save_panels(panels, f"Real models on the text '{row['text']}', {gpus}, {row['dtype']}", path)
