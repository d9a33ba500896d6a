"""The leaderboard in one line a selector: how many sweeps reach a KL, at how many times the fewest blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from bench.fidelity_tables import TARGETS, density_at, sweeps
from bench.tables import markdown_table
from flexprefill_fa.masks import get_selector
from flexprefill_fa.tools.fidelity.knobs import knob_fields
from flexprefill_fa.tools.fidelity.plot import curves
from flexprefill_fa.tools.rows import Row

_TEXT = "source"


def fidelity_summary(rows: Iterable[Row]) -> str:
    """One line a selector, over every model, text and length; those with mean correction are left to the tables."""
    found = [[row for row in group if not row["mean_correction"]] for group in sweeps(rows)]
    by_length = [
        [row for row in group if row["length"] == length]
        for group in found
        for length in sorted({row["length"] for row in group})
    ]
    if not by_length:
        return ""
    reached = [{target: _densities(rows, target) for target in TARGETS} for rows in by_length]
    shown = _longest(by_length)
    head = ["selector", *(f"KL {target:g}" for target in TARGETS)]
    head += [f"as it comes on {rows[0]['model']}, {rows[0]['length']:,} tokens" for rows in shown]
    body = []
    for name in dict.fromkeys(row["selector"] for rows in by_length for row in rows):
        cells = [_share([each[target] for each in reached], name) for target in TARGETS]
        body.append([name, *cells, *(_usual(rows, name) for rows in shown)])
    least = ", ".join(f"{target:g}" for target in TARGETS)
    lost = [line for rows in shown if (line := _lost(rows))]
    return (
        f"Of {len(by_length)} sweeps ({_what(by_length)}), those in which a selector comes within a KL to dense "
        f"attention of {least} nats, and how many times the sparsest selector's blocks it needs. As it comes: "
        f"density and KL of the selector's usual knob, and the share of positions whose most likely token stays the "
        f"same, on the text '{_TEXT}'.\n\n{markdown_table(head, body)}" + "".join(f"\n\n{line}" for line in lost)
    )


def _densities(rows: Sequence[Row], target: float) -> dict[str, float]:
    """Selector -> the least density at which one of its curves reaches a KL."""
    found: dict[str, float] = {}
    for name, points in curves(rows).items():
        density, selector = density_at(points, target), name.split(" ")[0]
        if density is not None:
            found[selector] = min(density, found.get(selector, density))
    return found


def _share(reached: Sequence[dict[str, float]], name: str) -> str:
    ratios = [found[name] / min(found.values()) for found in reached if name in found]
    if not ratios:
        return "in none"
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return f"in {len(ratios)}, {low}x" if low == high else f"in {len(ratios)}, {low}x to {high}x"


def _longest(by_length: Sequence[list[Row]]) -> list[list[Row]]:
    """Of each model the longest text."""
    found: dict[str, list[Row]] = {}
    for rows in by_length:
        row = rows[0]
        if row["text"] == _TEXT and row["length"] > found.get(row["model"], [{"length": 0}])[0]["length"]:
            found[row["model"]] = rows
    return list(found.values())


def _usual(rows: Sequence[Row], name: str) -> str:
    row = _as_it_comes(rows, name)
    return f"{row['density']:.3f}: KL {row['kl']:.3f}, {row['same_top']:.1%} the same" if row else "-"


def _as_it_comes(rows: Sequence[Row], name: str) -> Row | None:
    usual = dataclasses.asdict(get_selector(name)())
    for row in rows:
        if row["selector"] == name and all(row["settings"][field] == usual[field] for field in knob_fields(name)):
            return row
    return None


def _lost(rows: Sequence[Row]) -> str:
    """What is lost by those that keep more blocks than another selector and are further from dense by both measures."""
    found = [row for name in dict.fromkeys(row["selector"] for row in rows) if (row := _as_it_comes(rows, name))]
    lines = []
    for row in found:
        better = [other for other in found if other["density"] < row["density"] and _is_nearer(other, row)]
        if better:
            best = min(better, key=lambda other: other["kl"])
            lines.append(
                f"{row['selector']} keeps {row['density']:.1%} of the blocks and another token becomes most likely "
                f"at {1 - row['same_top']:.1%} of positions; {best['selector']} keeps {best['density']:.1%}, and it "
                f"does at {1 - best['same_top']:.1%}"
            )
    return f"What is lost on {rows[0]['model']}, {rows[0]['length']:,} tokens: {'. '.join(lines)}." if lines else ""


def _is_nearer(one: Row, other: Row) -> bool:
    return one["kl"] < other["kl"] and one["same_top"] > other["same_top"]


def _what(by_length: Sequence[list[Row]]) -> str:
    lengths: dict[str, set[int]] = {}
    for rows in by_length:
        lengths.setdefault(rows[0]["model"], set()).add(rows[0]["length"])
    texts = " and ".join(dict.fromkeys(rows[0]["text"] for rows in by_length))
    models = "; ".join(f"{model} at {', '.join(f'{n:,}' for n in sorted(found))}" for model, found in lengths.items())
    return f"{models} tokens; {texts}"
