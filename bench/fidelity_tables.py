"""The leaderboard: which density each selector needs to stay within a KL of dense attention, on real models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from bench.real_answers import RealAnswers
from bench.report import number
from bench.selection_costs import LENGTHS, SelectionCosts
from bench.tables import distinct, markdown_table, milliseconds
from flexprefill_fa.tools.fidelity.plot import CORRECTED, curves
from flexprefill_fa.tools.reporting import settings_text
from flexprefill_fa.tools.rows import Row, latest

TARGETS = (0.1, 0.03, 0.01)
"""KL(dense || sparse) in nats, mean over positions."""
_GROUP = ("model", "model_sha256", "text", "skip", "dtype", "device", "gpu", "chunk")


_SWEEP = 3
"""Settings of one curve from which on rows are a sweep."""


def sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    """The latest rows of each model and text, where some curve has at least `_SWEEP` points."""
    return [group for group in _groups(rows) if _is_sweep(group)]


def _is_sweep(group: Sequence[Row]) -> bool:
    return any(
        len(points) >= _SWEEP
        for length in {row["length"] for row in group}
        for points in curves([row for row in group if row["length"] == length]).values()
    )


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in latest(rows, _measured):
        if not row["dense_layers"]:
            found.setdefault(json.dumps([row[key] for key in _GROUP]), []).append(row)
    return list(found.values())


def leaderboards(rows: Iterable[Row], costs: SelectionCosts, answers: RealAnswers) -> str:
    """One table for each model and text: the density at each KL and length, what selecting takes, what is answered."""
    tables = [_leaderboard(group, costs, answers) for group in sweeps(rows)]
    return "\n\n".join(filter(None, [costs.conditions() if tables else "", *tables]))


def single_settings(rows: Iterable[Row]) -> str:
    """One table for each model and text that was read with a few settings, no sweeps: a line for each row."""
    return "\n\n".join(_settings(group) for group in _groups(rows) if not _is_sweep(group))


def _settings(group: Sequence[Row]) -> str:
    head = ["tokens", "selector", "settings", "density", "KL", "KL, 99 %", "same top token"]
    body = [
        [
            *(f"{row['length']:,}", row["selector"], settings_text(row) or "-", f"{row['density']:.3f}"),
            *(f"{row['kl']:.3f}", f"{row['kl_99']:.2f}", f"{row['same_top']:.3f}"),
        ]
        for row in group
    ]
    what = f"single settings, mean over the positions after the first {group[0]['skip']:,}"
    return f"{_subject(group)}: {what}. {_where(group)}\n\n{markdown_table(head, body)}"


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


def _leaderboard(group: Sequence[Row], costs: SelectionCosts, answers: RealAnswers) -> str:
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

    sha = group[0]["model_sha256"]
    asked = answers.lengths(sha)
    head = ["selector", *(f"{length:,}: KL {target:g}" for length in lengths for target in TARGETS)]
    head += [f"select {length // 1024}K, ms" for length in LENGTHS]
    head += [f"answers at {' / '.join(f'{length // 1024}K' for length in asked)}"] * bool(asked)
    body = []
    for name, values in cells.items():
        plain = name.removesuffix(CORRECTED)
        line = [name, *map(cell, values, least)]
        line += [milliseconds(costs.milliseconds(plain, length)) for length in LENGTHS]
        line += [answers.text(sha, plain, corrected=name != plain) or "-"] * bool(asked)
        body.append(line)
    told = _caption(group)
    if asked:
        told += f" Answers: mean accuracy on the RULER tasks below, of one setting; dense {answers.text(sha) or '-'}."
    return f"{told}\n\n{markdown_table(head, body)}"


def _caption(group: Sequence[Row]) -> str:
    return (
        f"{_subject(group)}: density needed for a KL "
        f"to dense attention of {', '.join(f'{target:g}' for target in TARGETS)} nats, mean over the positions after "
        f"the first {group[0]['skip']}, read between the settings of a sweep; - where the sweep does not reach it. "
        f"Bold: the least. {_where(group)}"
    )


def _subject(group: Sequence[Row]) -> str:
    row = group[0]
    return f"**{row['model']}** (SHA-256 {row['model_sha256'][:10]}) on the text '{row['text']}'"


def _where(group: Sequence[Row]) -> str:
    row = group[0]
    chunk = "" if row["chunk"] is None else f", in chunks of {row['chunk']:,}"
    return (
        f"{row['dtype']}, {row['gpu']}{chunk}, torch {distinct(group, 'torch')}, transformers "
        f"{distinct(group, 'transformers')}, commit {distinct(group, 'commit')}."
    )
