"""The leaderboard: which density each selector needs to stay within a KL of dense attention, on real models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from bench.report import number
from bench.tables import distinct, markdown_table
from flexprefill_fa.fidelity.plot import curves
from flexprefill_fa.rows import Row, latest

TARGETS = (0.1, 0.03, 0.01)
"""KL(dense || sparse) in nats, mean over positions."""
_GROUP = ("model", "model_sha256", "text", "skip", "dtype", "device", "gpu", "chunk")


def leaderboards(rows: Iterable[Row]) -> str:
    """One table for each model and text: the density at each KL and length."""
    found: dict[str, list[Row]] = {}
    for row in latest(rows, _measured):
        if not row["dense_layers"]:
            found.setdefault(json.dumps([row[key] for key in _GROUP]), []).append(row)
    return "\n\n".join(_leaderboard(group) for group in found.values())


def density_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The density at which a curve of (density, KL), sparsest first, reaches a target: linear in both logarithms.

    None where the curve does not reach it, or begins below it.
    """
    for (low, above), (high, below) in pairwise(points):
        if above >= target >= below:
            share = 0.0 if above == below else math.log(above / target) / math.log(above / below)
            return low * (high / low) ** share
    return None


def _measured(row: Row) -> str:
    names = (*_GROUP, "length", "selector", "settings", "mean_correction", "dense_layers")
    return json.dumps([row[name] for name in names], sort_keys=True)


def _leaderboard(group: Sequence[Row]) -> str:
    lengths = sorted({row["length"] for row in group})
    by_length = [curves([row for row in group if row["length"] == length]) for length in lengths]
    names = list(dict.fromkeys(name for found in by_length for name in found))
    cells = {
        name: [density_at(found.get(name, []), target) for found in by_length for target in TARGETS] for name in names
    }
    least = [
        min((value for value in column if value is not None), default=None)
        for column in zip(*cells.values(), strict=True)
    ]

    def cell(value: float | None, best: float | None) -> str:
        text = number(value, ".3f")
        return f"**{text}**" if value is not None and value == best else text

    head = ["selector", *(f"{length:,}: KL {target:g}" for length in lengths for target in TARGETS)]
    body = [[name, *map(cell, values, least)] for name, values in cells.items()]
    return f"{_caption(group)}\n\n{markdown_table(head, body)}"


def _caption(group: Sequence[Row]) -> str:
    row = group[0]
    return (
        f"**{row['model']}** (SHA-256 {row['model_sha256'][:10]}) on the text '{row['text']}': density needed for a KL "
        f"to dense attention of {', '.join(f'{target:g}' for target in TARGETS)} nats, mean over the positions after "
        f"the first {row['skip']}, read between the settings of a sweep; - where the sweep does not reach it. Bold: "
        f"the least. {row['dtype']}, {row['gpu']}, torch {distinct(group, 'torch')}, transformers "
        f"{distinct(group, 'transformers')}, commit {distinct(group, 'commit')}."
    )
