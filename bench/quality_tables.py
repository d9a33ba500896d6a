"""Tables of `python -m bench quality`: recall and output error against density, and what mean correction does."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.fidelity_tables import between
from bench.tables import Line, Table, cells, group_rows, key, mark, method, number, values
from flexprefill_fa import get_selector
from flexprefill_fa.tools.rows import Row

KIND = "quality"
"""Of the rows of `python -m bench quality`."""
DENSITIES = (0.05, 0.1, 0.2, 0.4)
CORRECTED = (0.05, 0.1, 0.2)
"""Alphas of flashprefill in the table about mean correction."""
_PROMPT = "layer seed"  # what a point is the mean over, beside the heads

Point = dict[str, Any]
"""One setting at one length, the mean over layers, prompts and heads.

`density` and `recall` are those of `BlockSelection`; `error` is the relative L2 distance of the output from exact dense
attention, `corrected` the same with mean correction, None where it was not measured; `worst` and `corrected_worst` are
those of the worst head, `share` is `corrected` / `error`. The other fields are those of its rows.
"""


def families(rows: Sequence[Row], length: int) -> dict[str, list[Point]]:
    """The sweeps at one length of one table's rows, by ascending density, named by their fixed settings.

    A setting counts only where it has a row for every layer and prompt that the rows have at this length: else its mean
    would be over other heads than its neighbours'.
    """
    here = [row for row in rows if row["length"] == length]
    prompts = {key(row, _PROMPT) for row in here}
    found: dict[str, list[Point]] = {}
    for same in group_rows(here, "selector settings"):
        parts = [[row for row in same if row["mean_correction"] is correction] for correction in (False, True)]
        plain, corrected = (part if {key(row, _PROMPT) for row in part} == prompts else [] for part in parts)
        either = plain or corrected  # the correction changes the output, not the selection
        if not either:
            continue
        point = {**same[0], "density": _mean(either, "density"), "recall": _mean(either, "recall")}
        for part, error, worst in ((plain, "error", "worst"), (corrected, "corrected", "corrected_worst")):
            point[error], point[worst] = _mean(part, "error"), max((row["error_max"] for row in part), default=None)
        known = point["error"] and point["corrected"] is not None
        point["share"] = point["corrected"] / point["error"] if known else None
        swept = get_selector(point["selector"]).sweep
        fixed = {name: value for name, value in point["settings"].items() if name not in swept}
        found.setdefault(method({"selector": point["selector"], "settings": fixed}), []).append(point)
    return {name: sorted(points, key=lambda point: point["density"]) for name, points in found.items()}


def _mean(rows: Sequence[Row], name: str) -> float | None:
    return statistics.fmean(row[name] for row in rows) if rows else None


def at(points: Sequence[Point], name: str, density: float) -> float | None:
    """A field at a density: linear in log density between the two neighbours, None outside of the points with it."""
    known = [(math.log(point["density"]), point[name]) for point in points if point[name] is not None]
    return between([*known[:1], *known], math.log(density))  # a single point is its own neighbour


_READ = {"recall": ("recall", max), "error": ("error", min), "corrected error": ("corrected", min)}


def _selectors(rows: list[Row]) -> list[Line]:
    """A line for each length and sweep; of each length, the best at each density is bold."""
    lines = []
    for length in values(rows, "length"):
        found = families(rows, length)
        here = [{"tokens": f"{length:,}", "selector": name} for name in found]
        for (title, (name, choose)), density in itertools.product(_READ.items(), DENSITIES):
            for line, points in zip(here, found.values(), strict=True):
                line[f"{title} at {density:.0%}"] = number(at(points, name, density), ".3f")
            mark(here, f"{title} at {density:.0%}", choose)
        lines += here
    return lines


def _points(rows: list[Row]) -> list[Line]:
    """A line for each setting, the densest first."""
    columns = {
        "tokens": "length:,",
        "selector": lambda point: method({**point, "mean_correction": False}),
        "density": "density:.3f",
        "recall": "recall:.3f",
        "error": "error:.3f",
        "corrected": "corrected:.3f",
        "of the error": "share:.3f",
        "worst head": "worst:.3f",
        "worst head, corrected": "corrected_worst:.3f",
    }
    found = (family for length in values(rows, "length") for family in families(rows, length).values())
    return [cells(point, columns) for family in found for point in family[::-1]]


_OF = "**The needle model (SHA-256 {model_sha256:.10})**: means over heads, layers and prompts; "
SELECTORS = Table(
    group_by="model_sha256 device gpu batch heads kv_heads head_dim dtype workload",
    identity=f"{_PROMPT} length selector settings backend mean_correction",
    caption=_OF + "recall and relative output error at equal densities, read between the two nearest settings of "
    "each sweep, the best in bold",
    lines=_selectors,
    where=lambda row: row["kind"] == KIND,
    notes=lambda rows: f"Rounding alone gives dense attention an error of {max(values(rows, 'dense_error')):.2g}.",
    told="layer seed",
)
SETTINGS = dataclasses.replace(SELECTORS, lines=_points, caption=_OF + "relative output error")
CORRECTION = dataclasses.replace(
    SETTINGS,
    where=lambda row: (
        SELECTORS.where(row) and row["selector"] == "flashprefill" and row["settings"]["alpha"] in CORRECTED
    ),
)
