"""The leaderboard: which density each selector needs to stay within a KL of dense attention, on real models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from bench.accuracy_tables import RealAnswers
from bench.quality_tables import between
from bench.speed_tables import ATTENTION
from bench.tables import (
    Column,
    Table,
    across,
    bold,
    column,
    conditions,
    distinct,
    ends,
    group_rows,
    has_usual_knob,
    key,
    markdown_table,
    method,
    number,
    paragraphs,
    pivot,
    settings_of,
)
from flexprefill_fa.tools.fidelity.plot import curves, without_correction
from flexprefill_fa.tools.reporting import settings_text
from flexprefill_fa.tools.rows import Row

TARGETS = (0.1, 0.03, 0.01)
"""KL(dense || sparse) in nats, mean over positions."""
_SWEEP = 3  # settings of one curve from which on rows are a sweep
_TEXT = "source"  # of summary and plot
_COSTS = {"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "device": "cuda"}
_COSTS |= {"workload": "sharpened"}
_COST_LENGTHS = (32_768, 131_072)  # tokens


def density_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The density at which a curve of (density, KL), sparsest first, reaches a target: linear in both logarithms.

    None where the curve does not reach it, or begins below it.
    """
    if not points or points[0][1] < target:
        return None
    found = between([(math.log(kl), math.log(density)) for density, kl in points], math.log(target))
    return None if found is None else math.exp(found)


def sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    """The latest rows of each model and text, where some curve has at least `_SWEEP` points."""
    return [group for group in _GROUPS.groups(rows) if _is_sweep(group)]


def plain_sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    """Those on source code, plain and with tilted means."""
    return sweeps(row for row in rows if row["text"] == _TEXT and row["mean_correction"] is not True)


def _is_sweep(group: Sequence[Row]) -> bool:
    return any(len(points) >= _SWEEP for part in _by_length(group) for points in curves(part).values())


def _by_length(group: Sequence[Row]) -> list[list[Row]]:
    """Ascending."""
    return sorted(group_rows(group, ["length"]), key=lambda rows: rows[0]["length"])


def _subject(group: Sequence[Row], what: str) -> str:
    row = group[0]
    chunk = "" if row["chunk"] is None else f", in chunks of {row['chunk']:,}"
    return (
        f"**{row['model']}** (SHA-256 {row['model_sha256'][:10]}) on the text '{row['text']}': {what} {row['dtype']}, "
        f"{distinct(group, 'gpu')}{chunk}, torch {distinct(group, 'torch')}, transformers "
        f"{distinct(group, 'transformers')}, commit {distinct(group, 'commit')}."
    )


_GROUPS = Table(
    group_by=("model", "model_sha256", "text", "skip", "dtype", "device", "chunk"),
    identity=("length", "selector", "settings", "mean_correction", "dense_layers"),
    where=lambda row: not row["dense_layers"],
    columns=lambda group: [
        column("tokens", "length", ","),
        column("selector", "selector"),
        ("settings", lambda row: settings_text(row) or "-"),
        column("density", "density", ".3f"),
        column("KL", "kl", ".3f"),
        column("KL, 99 %", "kl_99", ".2f"),
        column("same top token", "same_top", ".3f"),
    ],
    caption=lambda group: _subject(
        group, f"single settings, mean over the positions after the first {group[0]['skip']:,}."
    ),
)


def single_settings(rows: Iterable[Row]) -> str:
    """One table for each model and text that was read with a few settings, no sweeps: a line for each row."""
    return paragraphs(_GROUPS.one(group) for group in _GROUPS.groups(rows) if not _is_sweep(group))


def _chunk_columns(group: list[Row]) -> list[Column]:
    """Of lines that are a setting's rows by chunk."""
    chunks = sorted({row["chunk"] for row in group}, key=lambda chunk: -(chunk or math.inf))
    titles = {chunk: "whole" if chunk is None else f"in chunks of {chunk:,}" for chunk in chunks}
    return [
        ("selector", lambda line: method(next(iter(line.values())))),
        *across(titles, lambda row: f"{row['kl']:.3f} at {row['density']:.3f}"),
    ]


CHUNKS = Table(
    group_by=("model", "model_sha256", "length", "text", "skip", "dtype", "device"),
    identity=("chunk", "selector", "settings"),
    columns=_chunk_columns,
    lines=lambda group: pivot(group, lambda row: key(row, ("selector", "settings")), lambda row: row["chunk"]).values(),
    caption=lambda group: _subject(
        [group[0] | {"chunk": None}, *group[1:]], f"{group[0]['length']:,} tokens; KL to dense attention at density."
    ),
)
"""What it costs that a chunk's selection sees its own queries alone."""


Costs = dict[tuple[str, int], Row]


def selection_costs(rows: Iterable[Row]) -> Costs:
    """The latest row of each selector and length that timed a selection of the benchmark's own shape on a GPU."""
    own = (row for group in ATTENTION.groups(rows) for row in group if row | _COSTS == row and "select_ms" in row)
    return {(row["selector"], row["length"]): row for row in own if row["length"] in _COST_LENGTHS}


def leaderboards(rows: Iterable[Row], attention: Iterable[Row], answers: Iterable[Row]) -> str:
    """One table for each model and text: the density at each KL and length, what selecting takes, what is answered."""
    costs, answers = selection_costs(attention), list(answers)
    tables = [_leaderboard(group, costs, RealAnswers(answers, group[0]["model_sha256"])) for group in sweeps(rows)]
    told = {name: f"{name} with {settings_of(row['settings'])}" for (name, _), row in costs.items()}
    timed = f"Selection in ms, for all heads of one layer: {'; '.join(told.values())}. "
    return paragraphs([f"{timed}{conditions(list(costs.values()))}." if tables and costs else "", *tables])


def _leaderboard(group: list[Row], costs: Costs, answers: RealAnswers) -> str:
    drawn = {part[0]["length"]: curves(part) for part in _by_length(group)}
    names = {name: without_correction(name) for found in drawn.values() for name in found}
    columns: dict[str, dict[str, str]] = {}
    for length, target in itertools.product(drawn, TARGETS):
        found = {name: density_at(points, target) for name, points in drawn[length].items()}
        least = min((value for value in found.values() if value is not None), default=None)
        cells = {name: bold(number(value, ".3f"), value == least) for name, value in found.items() if value}
        columns[f"{length:,}: KL {target:g}"] = cells
    for length in _COST_LENGTHS:
        timed = {name: costs[plain, length] for name, (plain, _) in names.items() if (plain, length) in costs}
        cells = {name: number(row["select_ms"], "ms") for name, row in timed.items()}
        columns[f"select {length // 1024}K, ms"] = cells
    told = _subject(
        group,
        f"density needed for a KL to dense attention of {', '.join(f'{target:g}' for target in TARGETS)} nats, "
        f"mean over the positions after the first {group[0]['skip']}, read between the settings of a sweep; - "
        "where the sweep does not span it. Bold: the least.",
    )
    if answers.asked:
        title = f"answers at {' / '.join(f'{length // 1024}K' for length in answers.asked)}"
        columns[title] = {name: answers.text(*who) for name, who in names.items()}
        tasks = " / ".join(str(len(asked)) for asked in answers.asked.values())
        usual = f"of the selector's usual knob; dense {answers.text()}"
        told += f" Answers: mean accuracy on {tasks} RULER tasks, below, {usual}."
    body = [[name, *(cells.get(name, "-") for cells in columns.values())] for name in names]
    return f"{told}\n\n{markdown_table(['selector', *columns], body)}"


# The same in one line a selector: how many sweeps reach a KL, at how many times the fewest blocks.


def fidelity_summary(rows: Iterable[Row]) -> str:
    """One line a selector, over every model, text and length; those with mean correction are left to the tables."""
    plain = [[row for row in group if not row["mean_correction"]] for group in sweeps(rows)]
    found = [part for group in plain for part in _by_length(group)]
    if not found:
        return ""
    reached = [[_densities(part, target) for part in found] for target in TARGETS]
    longest: dict[str, list[Row]] = {}
    for part in sorted(found, key=lambda part: part[0]["length"]):
        if part[0]["text"] == _TEXT:
            longest[part[0]["model"]] = part
    shown = [longest[name] for name in dict.fromkeys(part[0]["model"] for part in found) if name in longest]
    head = ["selector", *(f"KL {target:g}" for target in TARGETS)]
    head += [f"as it comes on {part[0]['model']}, {part[0]['length']:,} tokens" for part in shown]
    body = [
        [name, *(_share(by_sweep, name) for by_sweep in reached), *(_usual(part, name) for part in shown)]
        for name in dict.fromkeys(row["selector"] for part in found for row in part)
    ]
    caption = (
        f"Of {len(found)} sweeps ({_what(found)}), those in which a selector comes within a KL to dense "
        f"attention of {', '.join(f'{target:g}' for target in TARGETS)} nats, and how many times the sparsest "
        "selector's blocks it needs. As it comes: density and KL of the selector's usual knob, and the share of "
        f"positions whose most likely token stays the same, on the text '{_TEXT}'."
    )
    return paragraphs([caption, markdown_table(head, body), *map(_lost, shown)])


def _densities(rows: Sequence[Row], target: float) -> dict[str, float]:
    """Selector -> the least density at which one of its curves reaches a KL."""
    found: dict[str, float] = {}
    for name, points in curves(rows).items():
        selector = without_correction(name)[0].split(" ")[0]
        if (density := density_at(points, target)) is not None:
            found[selector] = min(density, found.get(selector, density))
    return found


def _share(reached: Sequence[dict[str, float]], name: str) -> str:
    ratios = [found[name] / min(found.values()) for found in reached if name in found]
    return f"in {len(ratios)}, {ends(ratios, '.1f', 'x')}" if ratios else "in none"


def _as_it_comes(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row["selector"] == name and has_usual_knob(row)), None)


def _usual(rows: Sequence[Row], name: str) -> str:
    row = _as_it_comes(rows, name)
    return f"{row['density']:.3f}: KL {row['kl']:.3f}, {row['same_top']:.1%} the same" if row else "-"


def _lost(rows: Sequence[Row]) -> str:
    """What is lost by those that keep more blocks than another selector and are further from dense by both measures."""
    found = [row for name in dict.fromkeys(row["selector"] for row in rows) if (row := _as_it_comes(rows, name))]
    lines = []
    for row in found:
        sparser = [other for other in found if other["density"] < row["density"]]
        better = [other for other in sparser if other["kl"] < row["kl"] and other["same_top"] > row["same_top"]]
        if better:
            best = min(better, key=lambda other: other["kl"])
            lines.append(
                f"{row['selector']} keeps {row['density']:.1%} of the blocks and another token becomes most likely "
                f"at {1 - row['same_top']:.1%} of positions; {best['selector']} keeps {best['density']:.1%}, and it "
                f"does at {1 - best['same_top']:.1%}"
            )
    return f"What is lost on {rows[0]['model']}, {rows[0]['length']:,} tokens: {'. '.join(lines)}." if lines else ""


def _what(found: Sequence[list[Row]]) -> str:
    lengths: dict[str, set[int]] = {}
    for rows in found:
        lengths.setdefault(rows[0]["model"], set()).add(rows[0]["length"])
    texts = " and ".join(dict.fromkeys(rows[0]["text"] for rows in found))
    models = "; ".join(f"{model} at {', '.join(f'{n:,}' for n in sorted(found))}" for model, found in lengths.items())
    return f"{models} tokens; {texts}"
