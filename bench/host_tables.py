"""The table of host time: what a call costs the CPU before the GPU has its work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.tables import Table, across, conditions, distinct, number, pivot
from flexprefill_fa.tools.rows import Row

_NAMES = {"sdpa": "SDPA", "dense auto": "dense, as `auto` chooses"}
_GRAPHS = {"never": "host time, µs", "auto": 'with graph="auto", µs'}


def _lines(rows: Sequence[Row]) -> Iterable[Mapping[str, Row]]:
    return pivot(rows, lambda row: row["case"], lambda row: row["graph"]).values()


def _caption(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"**{row['length']:,} tokens**: medians of {distinct(rows, 'repeats')} calls, each with an idle GPU before it, "
        f"selectors as they come by {distinct(_of_selectors(rows), 'kernel')}. {conditions([{'batch': 1, **row}])}."
    )


def _of_selectors(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["case"] not in _NAMES]


def _name(line: Mapping[str, Row]) -> str:
    case = next(iter(line.values()))["case"]
    return str(_NAMES.get(case, case))


HOST = Table(
    group_by=("gpu", "length", "heads", "kv_heads", "head_dim", "dtype"),
    identity=("case", "graph"),
    columns=lambda rows: [
        ("", _name),
        *across(_GRAPHS, lambda row: number(row["host_us"], ",.0f")),
    ],
    caption=_caption,
    lines=_lines,
    where=lambda row: "graph" in row,
)
