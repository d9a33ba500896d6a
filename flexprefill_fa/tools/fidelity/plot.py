"""KL against density, one curve for each selector."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexprefill_fa.masks import get_selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.fidelity.knobs import knob_fields
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.rows import Row

_ACROSS = 3  # axes in a row
_LEAST_KL = 1e-6  # what is below is rounding, and has no place on a logarithmic axis
_ROUNDING = 1e-4  # of bf16, where nearly every block is kept
_TICKS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1)
CORRECTED: dict[MeanCorrection, str] = {False: "", True: ", corrected", "tilted": ", tilted"}
"""What the names of curves with a mean correction end in."""


def require_matplotlib() -> None:
    """Check that there is something to draw with.

    Raises:
        UsageError: naming the extra to install.
    """
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'flexprefill-fa[bench]'") from error


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (density, KL) by ascending density, of rows of one text and length.

    Rows whose settings differ in the selector's knob alone are one curve; its name says in which other settings it
    differs from the selector's other curves, unless they are the usual ones; it ends as `CORRECTED` says.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps([row["selector"], _fixed(row)]), []).append(row)
    named = {}
    for key, members in found.items():
        selector, fixed = json.loads(key)
        others = [json.loads(other)[1] for other in found if json.loads(other)[0] == selector]
        corrected = fixed.pop("mean_correction")
        usual = dataclasses.asdict(get_selector(selector)()) | {"dense_layers": []}
        differing = [
            name
            for name, value in fixed.items()
            if value != usual.get(name) and any(other.get(name) != value for other in others)
        ]
        name = " ".join([selector, *(f"{field}={fixed[field]}" for field in differing)]) + CORRECTED[corrected]
        named[name] = sorted((row["density"], max(row["kl"], _LEAST_KL)) for row in members)
    return named


def without_correction(name: str) -> tuple[str, MeanCorrection]:
    """The name of a curve without its ending, and the mean correction that the ending tells."""
    for kind, ending in CORRECTED.items():
        if ending and name.endswith(ending):
            return name.removesuffix(ending), kind
    return name, False


def _fixed(row: Row) -> dict[str, Any]:
    knob = knob_fields(row["selector"])
    settings = {name: value for name, value in row["settings"].items() if name not in knob}
    return settings | {"mean_correction": row["mean_correction"], "dense_layers": row["dense_layers"]}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with axes for each text and length.

    Raises:
        UsageError: if it cannot be written.
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row['text']}, {row['length']:,} tokens", []).append(row)
    row = rows[0]
    try:
        save_panels(panels, f"{row['model']}, {row['gpu']}, {row['dtype']}", path)
    except OSError as error:
        raise UsageError(f"cannot write the plot to {path}: {error.strerror or error}") from error


def save_panels(panels: Mapping[str, Sequence[Row]], title: str, path: Path) -> None:
    """Write a PNG with axes for each panel, by its title: the curves of its rows, dashed with mean correction.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it

    across = min(len(panels), _ACROSS)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.5 * across, 4.4 * down + 0.6), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for spare in grid.flat[len(panels) :]:
        spare.set_axis_off()
    colours: dict[str, str] = {}
    names: dict[str, dict[str, str]] = {}
    for (heading, rows), axes in zip(panels.items(), grid.flat, strict=False):
        for name, points in curves(rows).items():
            plain, correction = without_correction(name)
            style = {False: "o-", True: "s--", "tilted": "^:"}[correction]
            colour = colours.setdefault(plain, f"C{len(colours)}")
            names.setdefault(name, {"color": colour, "marker": style[0], "linestyle": style[1:]})
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="density", ylabel="KL to dense, nats", title=heading)
        ticks = [tick for tick in _TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.set_xticks([], minor=True)
        if above := [row["kl"] for row in rows if row["kl"] > _ROUNDING]:  # lines to what is below leave the frame
            axes.set_ylim(bottom=min(above) / 1.5)
        axes.grid(alpha=0.3, which="both")
    first = grid[0, 0]
    for name, style in names.items():
        first.plot([], [], label=name, markersize=4, **style)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=across + 1, fontsize=8)
    figure.suptitle(title, size=10)
    figure.savefig(path, format="png", dpi=130)
