"""The leaderboard: which density each selector needs to stay within a KL of dense attention, on real models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from bench.tables import (
    Line,
    Table,
    cells,
    conditions,
    group_rows,
    mark,
    markdown,
    method,
    number,
    paragraphs,
    pivot,
    usual_knob,
)
from flexprefill_fa.tools.fidelity.plot import curves
from flexprefill_fa.tools.rows import Row

TARGETS = (0.1, 0.03, 0.01)
"""KL(dense || sparse) in nats, mean over positions."""
_SWEEP = 3  # settings of one curve from which on rows are a sweep
_TEXT = "source"  # of summary and plot
_OF = "**{model}** on the text '{text}', the positions after the first {skip:,}: "


def between(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """y at x, linear between the two neighbours among points (x, y); None where x lies outside of them."""
    for (low, below), (high, above) in pairwise(points):
        if min(low, high) <= x <= max(low, high):
            return below + (above - below) * (0.0 if low == high else (x - low) / (high - low))
    return None


def density_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The density at which a curve of (density, KL), sparsest first, reaches a target: linear in both logarithms.

    None where the curve does not reach it, or begins below it.
    """
    if not points or points[0][1] < target:
        return None
    found = between([(math.log(kl), math.log(density)) for density, kl in points], math.log(target))
    return None if found is None else math.exp(found)


def _is_sweep(group: Sequence[Row]) -> bool:
    return any(len(points) >= _SWEEP for part in group_rows(group, "length") for points in curves(part).values())


def _leaderboard(group: list[Row]) -> list[Line]:
    """A line for each curve: its density at each KL and length, the least in bold."""
    if not _is_sweep(group):
        return []
    entries = []
    for part in group_rows(sorted(group, key=lambda row: row["length"]), "length"):
        titles = {target: f"{part[0]['length']:,}: KL {target:g}" for target in TARGETS}
        for name, points in curves(part).items():
            read = {title: number(density_at(points, target), ".3f") for target, title in titles.items()}
            entries.append(({"selector": name}, read))
    columns = dict.fromkeys(title for _, read in entries for title in read)
    lines = pivot(entries, columns)
    for title in columns:
        mark(lines, title, min)
    return lines


def _singles(group: list[Row]) -> list[Line]:
    numbers = {"density": "density:.3f", "KL": "kl:.3f", "KL, 99 %": "kl_99:.2f", "same top token": "same_top:.3f"}
    columns = {"tokens": "length:,", "selector": method, **numbers}
    return [] if _is_sweep(group) else [cells(row, columns) for row in group]


LEADERBOARD = Table(
    group_by="model model_sha256 text skip chunk dtype device",
    identity="length selector settings mean_correction dense_layers",
    caption=_OF
    + "density needed for a KL to dense attention in nats, read between the settings of a sweep, - where it "
    "does not span that, the least in bold",
    lines=_leaderboard,
    where=lambda row: not row["dense_layers"],
)
SINGLES = dataclasses.replace(LEADERBOARD, lines=_singles, caption=_OF + "single settings")


def _chunks(group: list[Row]) -> list[Line]:
    """A line for each setting."""
    ordered = sorted(group, key=lambda row: -(row["chunk"] or math.inf))
    titles = {row["chunk"]: "whole" if row["chunk"] is None else f"in chunks of {row['chunk']:,}" for row in ordered}
    entries = (
        ({"selector": method(row)}, {titles[row["chunk"]]: f"{row['kl']:.3f} at {row['density']:.3f}"}) for row in group
    )
    return pivot(entries, titles.values())


CHUNKS = Table(
    group_by="model model_sha256 length text skip dtype device",
    identity="chunk selector settings",
    caption=_OF + "{length:,} tokens, KL to dense attention at density",
    lines=_chunks,
)


def _sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    return list(filter(_is_sweep, LEADERBOARD.groups(rows)))


def plain_sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    """The sweeps on source code, plain and with tilted means."""
    return _sweeps(row for row in rows if row["text"] == _TEXT and row["mean_correction"] is not True)


def fidelity_summary(rows: Iterable[Row]) -> str:
    """One line a selector, over every model, text and length; those with mean correction are left to the tables.

    In how many sweeps it reaches a KL, at how many times the fewest blocks; and what its usual knob keeps and loses.
    """
    groups = _sweeps(row for row in rows if not row["mean_correction"])
    sweeps = [part for group in groups for part in group_rows(group, "length")]
    if not sweeps:
        return ""
    reached = [[_densities(part, target) for part in sweeps] for target in TARGETS]
    shown = [_as_it_comes(group) for group in groups if group[0]["text"] == _TEXT]
    lines = []
    for name in dict.fromkeys(row["selector"] for part in sweeps for row in part):
        line = {"selector": name}
        for target, found in zip(TARGETS, reached, strict=True):
            ratios = [least[name] / min(least.values()) for least in found if name in least]
            told = dict.fromkeys(f"{ratio:.1f}x" for ratio in (min(ratios), max(ratios))) if ratios else ()
            line[f"KL {target:g}"] = f"in {len(ratios)}, {' to '.join(told)}" if ratios else "in none"
        for usual in shown:
            told = "{density:.3f}: KL {kl:.3f}, {same_top:.1%} the same".format(**usual[name]) if name in usual else "-"
            line[f"as it comes on {_where(usual)}"] = told
        lines.append(line)
    caption = (
        f"Of {len(sweeps)} sweeps ({conditions([part[0] for part in sweeps], 'model length text')}), those in which a "
        "selector comes within a KL to dense attention, in nats, and how many times the sparsest selector's blocks it "
        "needs. As it comes: density and KL of the usual knob, and the share of positions whose most likely token "
        f"stays the same, on '{_TEXT}'."
    )
    return paragraphs([caption, markdown(lines), *map(_lost, shown)])


def _as_it_comes(group: Sequence[Row]) -> dict[str, Row]:
    """The row of each selector with its usual knob, at the longest prompts."""
    longest = max(row["length"] for row in group)
    found = [row for row in group if row["length"] == longest and usual_knob(row)]
    return {row["selector"]: row for row in reversed(found)}


def _where(usual: dict[str, Row]) -> str:
    return "{model}, {length:,} tokens".format(**next(iter(usual.values())))


def _lost(usual: dict[str, Row]) -> str:
    """What is lost by those that keep more blocks than another selector and are further from dense by both measures."""
    lines = []
    for name, row in usual.items():
        sparser = [other for other in usual.values() if other["density"] < row["density"] and other["kl"] < row["kl"]]
        if better := [other for other in sparser if other["same_top"] > row["same_top"]]:
            best = min(better, key=lambda other: other["kl"])
            lines.append(
                f"{name} keeps {row['density']:.1%} of the blocks and another token becomes most likely at "
                f"{1 - row['same_top']:.1%} of positions; {best['selector']} keeps {best['density']:.1%}, and it does "
                f"at {1 - best['same_top']:.1%}"
            )
    return f"What is lost on {_where(usual)}: {'. '.join(lines)}." if lines else ""


def _densities(rows: Sequence[Row], target: float) -> dict[str, float]:
    """Selector -> the least density at which one of its curves reaches a KL."""
    found: dict[str, float] = {}
    for name, points in curves(rows).items():
        selector = name.split(" ")[0]
        if (density := density_at(points, target)) is not None:
            found[selector] = min(density, found.get(selector, density))
    return found
