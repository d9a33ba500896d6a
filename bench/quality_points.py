"""Quality rows as curves: the sweep of each selector, averaged over layers and heads, and read between its points."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flexprefill_fa import get_selector
from flexprefill_fa.tools.rows import Row, latest

KIND = "quality"
"""Of the rows of `python -m bench quality`."""

_GROUP_KEYS = ("device", "gpu", "batch", "heads", "kv_heads", "head_dim", "dtype", "workload", "model_sha256")
_PROMPT_KEYS = ("layer", "seed")  # what a point is the mean over, beside the heads


@dataclass(frozen=True)
class Point:
    """One setting at one length, the mean over layers, prompts and heads.

    Attributes:
        settings: of the selector.
        density, recall: kept blocks / causal blocks; share of the exact probability in them.
        error: relative L2 distance of the output from exact dense attention, None where it was not measured.
        corrected: the same with mean correction.
        worst, corrected_worst: those of the worst head.
    """

    settings: dict[str, Any]
    density: float
    recall: float
    error: float | None
    corrected: float | None
    worst: float | None = None
    corrected_worst: float | None = None


@dataclass(frozen=True)
class Family:
    """A selector's sweep at one length: `points` by ascending density, settings outside the sweep in `fixed`."""

    selector: str
    fixed: dict[str, Any]
    points: tuple[Point, ...]


def quality_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The latest rows of each measurement, those of one processor, shape and dtype together."""
    found: dict[str, list[Row]] = {}
    for row in latest((row for row in rows if row["kind"] == KIND), _measured):
        found.setdefault(json.dumps([row[key] for key in _GROUP_KEYS]), []).append(row)
    return list(found.values())


def _measured(row: Row) -> str:
    names = (*_GROUP_KEYS, *_PROMPT_KEYS, "length", "selector", "settings", "backend", "mean_correction")
    return json.dumps([row[name] for name in names], sort_keys=True)


def families(rows: Sequence[Row], length: int) -> list[Family]:
    """The sweeps at one length of one group of `quality_groups`, in the order of the rows.

    A setting counts only where it has a row for every layer and prompt that the group has at this length: else its
    mean would be over other heads than its neighbours'.
    """
    here = [row for row in rows if row["length"] == length]
    prompts = {_prompt(row) for row in here}
    members: dict[str, dict[str, list[Row]]] = {}
    for row in here:
        swept = get_selector(row["selector"]).sweep  # rows that share the other settings form one family
        fixed = {name: value for name, value in row["settings"].items() if name not in swept}
        family = members.setdefault(json.dumps([row["selector"], fixed]), {})
        family.setdefault(json.dumps(row["settings"]), []).append(row)
    found = []
    for name, by_setting in members.items():
        selector, fixed = json.loads(name)
        points = [point for same in by_setting.values() if (point := _point(same, prompts)) is not None]
        if points:
            found.append(Family(selector, fixed, tuple(sorted(points, key=lambda point: point.density))))
    return found


def _prompt(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _PROMPT_KEYS)


def _point(rows: Sequence[Row], prompts: set[tuple[Any, ...]]) -> Point | None:
    whole: dict[bool, list[Row]] = {}
    for correction in (False, True):
        part = [row for row in rows if row["mean_correction"] == correction]
        if {_prompt(row) for row in part} == prompts:
            whole[correction] = part
    if not whole:
        return None
    either = next(iter(whole.values()))  # the correction changes the output, not the selection
    errors = [_mean(whole[correction], "error") if correction in whole else None for correction in (False, True)]
    worst = [max(row["error_max"] for row in whole[x]) if x in whole else None for x in (False, True)]
    return Point(rows[0]["settings"], _mean(either, "density"), _mean(either, "recall"), *errors, *worst)


def _mean(rows: Sequence[Row], field: str) -> float:
    return math.fsum(row[field] for row in rows) / len(rows)


def labels(found: Sequence[Family]) -> list[str]:
    """Names that tell families apart: the selector, and the fixed settings in which it differs from its namesakes."""
    names = []
    for family in found:
        same = [other.fixed for other in found if other.selector == family.selector]
        differing = [name for name in family.fixed if len({json.dumps(fixed.get(name)) for fixed in same}) > 1]
        names.append(" ".join([family.selector, *(f"{name}={family.fixed[name]}" for name in differing)]))
    return names


def at_density(family: Family, field: str, density: float) -> float | None:
    """`recall`, `error` or `corrected` of a family at a density: linear in log density between the two neighbours.

    None outside the range of its points that have the field.
    """
    points = [(point.density, getattr(point, field)) for point in family.points if getattr(point, field) is not None]
    for at, value in points:
        if at == density:
            return value
    for (low, below), (high, above) in pairwise(points):
        if low < density < high:
            return below + (above - below) * math.log(density / low) / math.log(high / low)
    return None
