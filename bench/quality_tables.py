"""Tables of `python -m bench quality`: recall and output error against density, and what mean correction does."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from bench.tables import Table, bold, conditions, group_rows, key, number, values
from flexprefill_fa import get_selector
from flexprefill_fa.tools.rows import Row

KIND = "quality"
"""Of the rows of `python -m bench quality`."""
DENSITIES = (0.05, 0.1, 0.2, 0.4)
CORRECTED = (0.05, 0.1, 0.2)
"""Alphas of flashprefill in the table about mean correction."""

_PROMPT = ("layer", "seed")  # what a point is the mean over, beside the heads
_DIGITS = ".3f"


class Point(NamedTuple):
    """One setting at one length, the mean over layers, prompts and heads.

    `density` and `recall` are those of `BlockSelection`; `error` is the relative L2 distance of the output from exact
    dense attention, `corrected` the same with mean correction, None where it was not measured; `worst` and
    `corrected_worst` are those of the worst head.
    """

    settings: dict[str, Any]
    density: float
    recall: float
    error: float | None
    corrected: float | None
    worst: float | None = None
    corrected_worst: float | None = None


class Family(NamedTuple):
    """A selector's sweep at one length: `points` by ascending density, settings outside the sweep in `fixed`."""

    selector: str
    fixed: dict[str, Any]
    points: tuple[Point, ...]

    def at(self, field: str, density: float) -> float | None:
        """`recall`, `error` or `corrected` at a density: linear in log density between the two neighbours.

        None outside the range of its points that have the field.
        """
        points = [(point.density, found) for point in self.points if (found := getattr(point, field)) is not None]
        for at, value in points:
            if at == density:
                return value
        return between([(math.log(at), value) for at, value in points], math.log(density))


def between(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """y at x, linear between the two neighbours among points (x, y); None where x lies outside of them."""
    for (low, below), (high, above) in pairwise(points):
        if min(low, high) <= x <= max(low, high):
            return below + (above - below) * (0.0 if low == high else (x - low) / (high - low))
    return None


def families(rows: Sequence[Row], length: int) -> dict[str, Family]:
    """The sweeps at one length of one table's rows, by names that tell them apart, in the order of the rows.

    A name has the fixed settings in which a family differs from its selector's others. A setting counts only where it
    has a row for every layer and prompt that the rows have at this length: else its mean would be over other heads than
    its neighbours'.
    """
    here = [row for row in rows if row["length"] == length]
    prompts = {key(row, _PROMPT) for row in here}
    members: dict[str, list[Row]] = {}
    for row in here:
        swept = get_selector(row["selector"]).sweep  # rows that share the other settings form one family
        fixed = {name: value for name, value in row["settings"].items() if name not in swept}
        members.setdefault(json.dumps([row["selector"], fixed]), []).append(row)
    found = []
    for name, part in members.items():
        points = [_point(same, prompts) for same in group_rows(part, ["settings"])]
        if whole := sorted((point for point in points if point is not None), key=lambda point: point.density):
            selector, fixed = json.loads(name)
            found.append(Family(selector, fixed, tuple(whole)))
    named = {}
    for family in found:
        same = [other.fixed for other in found if other.selector == family.selector]
        differing = [
            f"{name}={value}" for name, value in family.fixed.items() if any(fixed.get(name) != value for fixed in same)
        ]
        named[" ".join([family.selector, *differing])] = family
    return named


def _point(rows: Sequence[Row], prompts: set[str]) -> Point | None:
    parts = [[row for row in rows if row["mean_correction"] is correction] for correction in (False, True)]
    whole = [part if {key(row, _PROMPT) for row in part} == prompts else [] for part in parts]
    either = whole[0] or whole[1]  # the correction changes the output, not the selection
    if not either:
        return None
    errors = [_mean(part, "error") if part else None for part in whole]
    worst = [max(row["error_max"] for row in part) if part else None for part in whole]
    return Point(rows[0]["settings"], _mean(either, "density"), _mean(either, "recall"), *errors, *worst)


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _table(what: str, lines: Callable[[list[Row]], list[list[str]]], header: Sequence[str]) -> Table:
    """Of lines that are cells already."""

    def caption(rows: Sequence[Row]) -> str:
        prompts = len(values(rows, "seed"))
        return (
            f"**The needle model (SHA-256 {rows[0]['model_sha256'][:10]}) on {prompts} needle "
            f"{'prompt' if prompts == 1 else 'prompts'}**, layers {', '.join(map(str, values(rows, 'layer')))}; means "
            f"over heads and layers. {conditions(rows)}; rounding alone gives dense attention an error of up to "
            f"{max(row['dense_error'] for row in rows):.2g}. {what}"
        )

    return Table(
        group_by=("device", "gpu", "batch", "heads", "kv_heads", "head_dim", "dtype", "workload", "model_sha256"),
        identity=(*_PROMPT, "length", "selector", "settings", "backend", "mean_correction"),
        where=lambda row: row["kind"] == KIND,
        lines=lines,
        columns=lambda rows: header,
        caption=caption,
    )


def _read(found: dict[str, Family], field: str, choose: Callable[[list[float]], float]) -> list[list[str]]:
    """One row for each family, one column for each density, the best of each column in bold; ties are all bold."""
    read = [[family.at(field, density) for density in DENSITIES] for family in found.values()]
    shown = [[None if value is None else round(value, 3) for value in row] for row in read]
    best = [choose(there) if (there := [x for x in row if x is not None]) else None for row in zip(*shown, strict=True)]
    return [
        [bold(number(value, _DIGITS), value is not None and value == top) for value, top in zip(row, best, strict=True)]
        for row in shown
    ]


def _selectors(rows: list[Row]) -> list[list[str]]:
    lines = []
    for length in values(rows, "length"):
        found = families(rows, length)
        parts = _read(found, "recall", max), _read(found, "error", min), _read(found, "corrected", min)
        for name, kept, *pair in zip(found, *parts, strict=True):
            errors = ["-" if both == ("-", "-") else " / ".join(both) for both in zip(*pair, strict=True)]
            lines.append([f"{length:,}", name, *kept, *errors])
    return lines


def _points(rows: list[Row], shown: Callable[[Family, Point], bool] = lambda family, point: True) -> list[list[str]]:
    """A line for each setting, the densest first."""
    lines = []
    for length in values(rows, "length"):
        for label, family in families(rows, length).items():
            for point in (point for point in family.points[::-1] if shown(family, point)):
                swept = [f"{name}={value:g}" for name, value in point.settings.items() if name not in family.fixed]
                ratio = point.corrected / point.error if point.corrected is not None and point.error else None
                found = (*point[1:5], ratio, *point[5:])
                lines.append([f"{length:,}", " ".join([label, *swept]), *(number(value, _DIGITS) for value in found)])
    return lines


_POINTS = ("tokens", "selector", "density", "recall", "error without", "error with", "with / without")
_POINTS += ("worst head without", "worst head with")
SELECTORS = _table(
    "Recall and relative output error (without / with mean correction) at equal densities, between the two nearest "
    "settings of each sweep; '-' where a sweep does not reach; the best in bold.",
    _selectors,
    ["tokens", "selector", *(f"{what} at {density:.0%}" for what in ("recall", "error") for density in DENSITIES)],
)
"""Recall and output error of every selector at equal densities."""
CORRECTION = _table(
    "Output error without and with mean correction.",
    partial(_points, shown=lambda at, point: at.selector == "flashprefill" and point.settings["alpha"] in CORRECTED),
    _POINTS,
)
"""What mean correction does to flashprefill's output error."""
SETTINGS = _table("Every setting.", _points, _POINTS)
"""What a run measured."""
