"""KL against density, one curve for each selector."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexprefill_fa.fidelity.knobs import knob_fields
from flexprefill_fa.loading import UsageError
from flexprefill_fa.rows import Row

_ACROSS = 3  # axes in a row
_LEAST_KL = 1e-6  # what is below is rounding, and has no place on a logarithmic axis


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
    differs from the selector's other curves.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps([row["selector"], _fixed(row)]), []).append(row)
    named = {}
    for key, members in found.items():
        selector, fixed = json.loads(key)
        others = [json.loads(other)[1] for other in found if json.loads(other)[0] == selector]
        differing = [name for name in fixed if any(other.get(name) != fixed[name] for other in others)]
        name = " ".join([selector, *(f"{field}={fixed[field]}" for field in differing)])
        named[name] = sorted((row["density"], max(row["kl"], _LEAST_KL)) for row in members)
    return named


def _fixed(row: Row) -> dict[str, Any]:
    knob = knob_fields(row["selector"])
    settings = {name: value for name, value in row["settings"].items() if name not in knob}
    return settings | {"mean_correction": row["mean_correction"], "dense_layers": row["dense_layers"]}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with axes for each text and length.

    Raises:
        UsageError: if it cannot be written.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it

    panels = list(dict.fromkeys((row["text"], row["length"]) for row in rows))
    across = min(len(panels), _ACROSS)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.5 * across, 4.4 * down + 0.6), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for spare in grid.flat[len(panels) :]:
        spare.set_axis_off()
    colours: dict[str, str] = {}
    for (text, length), axes in zip(panels, grid.flat, strict=False):
        here = [row for row in rows if (row["text"], row["length"]) == (text, length)]
        for name, points in curves(here).items():
            colour = colours.setdefault(name, f"C{len(colours)}")
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4)
        axes.set(
            xscale="log", yscale="log", xlabel="density", ylabel="KL to dense, nats", title=f"{text}, {length:,} tokens"
        )
        axes.grid(alpha=0.3, which="both")
    first = grid[0, 0]
    for name, colour in colours.items():
        first.plot([], [], "o-", color=colour, label=name, markersize=4)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    row = rows[0]
    figure.suptitle(f"{row['model']}, {row['gpu']}, {row['dtype']}", size=10)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise UsageError(f"cannot write the plot to {path}: {error.strerror or error}") from error
