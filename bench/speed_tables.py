"""The tables of time: of the attention alone, of other implementations, of calls on the CPU, and of the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bench.planning import YARDSTICK
from bench.tables import Line, Table, cells, conditions, field, kernel_name, key, markdown, method, pivot, settings_of
from flexprefill_fa.masks import get_selector
from flexprefill_fa.masks.selector import DEFAULT_SELECTOR
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row

OURS = "flexprefill_fa"
_SAME = "device gpu batch heads kv_heads head_dim dtype model model_sha256 text layer workload"
_METHOD = "selector settings"
_ONE = "kernel length selector settings backend implementation module function"


def _kernel(row: Row) -> str:
    """Whose code ran by which kernel."""
    if row["selector"] is None:
        return kernel_name(row)
    if row["path"] == "peer":
        return row["implementation"]
    chosen = f"({row['path']} {row['kernel']})" if row["backend"] == "auto" or row["path"] == "dense" else None
    return " ".join(filter(None, (OURS if row["kind"] == "peers" else None, row["backend"], chosen)))


def _timed(name: str, row: Row) -> str:
    """A time, or in its place the error; a table cell holds one line without bars."""
    return f"error: {row['error']}".replace("|", "/") if "error" in row else field(row, f"{name}:ms")


def _more(name: str, row: Row) -> str:
    """What a mean correction adds to the time of attention."""
    return f"+{row[name] / row['attend_ms'] - 1:.0%}" if name in row else "-"


def _clock(row: Row) -> str:
    """Of the time that counts, whose name is the first."""
    return next(iter(row.get("timed_by", {}).values()), "-")


_SELECTED = {
    "kernel": _kernel,
    "density": "density:.3f",
    "recall": "recall:.3f",
    "select ms": "select_ms:ms",
    "attend ms": "attend_ms:ms",
    "mean correction, of attend": partial(_more, "corrected_ms"),
    "tilted means": partial(_more, "tilted_ms"),
    "total ms": partial(_timed, "total_ms"),
    "GiB, inputs included": lambda row: f"{row['peak_total_bytes'] / 2**30:.3g}" if "peak_total_bytes" in row else "-",
}
_COMPARED = {
    "method": method,
    "implementation": _kernel,
    "density": "density:.3f",
    "error against dense": lambda row: field(row, "dense_error:.2g" if row["selector"] else "check_error:.2g"),
    "select ms": "select_ms:ms",
    "total ms": partial(_timed, "total_ms"),
    "timed by": _clock,
    "wall clock ms": "total_eager_ms:ms",
}
_OVER_GIVEN = {
    "density": "density:.3f",
    "kernel": _kernel,
    "error": "check_error:.2g",
    "attend ms": partial(_timed, "attend_ms"),
    "timed by": _clock,
    "TFLOP/s": "tflops:.0f",
    "of its dense TFLOP/s": "share_of_dense_tflops:.0%",
}
_LAST = {
    "x SDPA": "speedup_sdpa:x",
    "x SDPA flash": "speedup_sdpa_flash:x",
    "x best dense": "speedup_best_dense:x",
}


def _lines(rows: Sequence[Row], columns: Mapping[str, Any]) -> list[Line]:
    """A line for each row: by length, then by method, others' code last."""
    methods = list(dict.fromkeys(map(method, rows)))
    ordered = sorted(rows, key=lambda row: (row["length"], methods.index(method(row)), row["path"] == "peer"))
    return [cells(row, {"tokens": "length:,", **columns, **_LAST}) for row in ordered]


def _one_method(rows: Sequence[Row]) -> list[Line]:
    """A line for each length and backend of a selector; of dense attention, a line for each length."""
    if rows[0]["selector"] is not None:
        return _lines(rows, _SELECTED)
    ordered = sorted(rows, key=lambda row: row["length"])
    return pivot(
        (cells(row, {"tokens": "length:,"}), {f"{_kernel(row)} ms": _timed("total_ms", row)}) for row in ordered
    )


def _beside_dense(rows: Sequence[Row], time: str, columns: Mapping[str, Any]) -> list[Line]:
    """The lines of rows, with speed-ups over dense rows of another process where a row's own had none."""
    dense = [row for row in rows if row["selector"] is None]
    filled = []
    for row in (row for row in rows if row["selector"] is not None):
        here = [other for other in dense if other["length"] == row["length"] and "total_ms" in other]
        beside = {other["kernel"]: other["total_ms"] for other in here}
        yardstick = YARDSTICK[row["device"]]
        found = {"best_dense": min(beside.values(), default=None), yardstick: beside.get(yardstick)}
        known = {f"speedup_{name}": ms / row[time] for name, ms in found.items() if ms is not None and time in row}
        filled.append({**known, **{name: value for name, value in row.items() if value is not None}})
    return _lines([*(dense if time == "total_ms" else ()), *filled], columns)


def _sources(rows: Sequence[Row]) -> str:
    """Settings of each method, and whose code others' rows ran, in which state."""
    notes = []
    for row in rows:
        who, settings = f"{OURS}, {row['selector']}", row.get("settings")
        if row["path"] == "peer":
            version = f" {row['peer_version']}" if row["peer_version"] else ""
            who = f"{row['implementation']}{version}, `{row['module']}.{row['function']}`, digest {row['peer_digest']}"
            settings = row.get("peer_settings")
        elif row["selector"] in (None, "synthetic"):
            continue
        notes.append(": ".join(filter(None, (f"- {who}", settings_of(settings or {})))))
    return "\n".join(dict.fromkeys(notes))


ATTENTION = Table(
    group_by=f"{_METHOD} {_SAME}",
    identity=_ONE,
    caption="**Attention of one layer, {workload} heads**",
    lines=_one_method,
    where=lambda row: row["selector"] != "synthetic",
)
PEERS = Table(
    group_by=_SAME,
    identity=_ONE,
    caption="**Attention of one layer, {workload} heads**; each implementation on the same values, selection included",
    lines=partial(_beside_dense, time="total_ms", columns=_COMPARED),
    where=ATTENTION.where,
    notes=_sources,
)
GIVEN = Table(
    group_by=_SAME,
    identity=_ONE,
    caption="**Attention of one layer, {workload} heads**; attention alone, over random blocks of an exact density",
    lines=partial(_beside_dense, time="attend_ms", columns=_OVER_GIVEN),
    where=lambda row: row["selector"] in (None, "synthetic"),
    notes=_sources,
)


def attention_tables(rows: Iterable[Row], device: str, workload: str) -> str:
    """The tables of a kind of processor and of inputs."""
    return ATTENTION.markdown(row for row in rows if (row["device"], row["workload"]) == (device, workload))


def shown_first(rows: Iterable[Row]) -> list[Row]:
    """The rows that the plot and the README show, of heads that get sharper; none without rows of a GPU.

    They are those of the first GPU and settings that "auto" ran the default selector with, and dense ones beside them.
    """
    found = [row for row in ATTENTION.latest(rows) if (row["device"], row["workload"]) == ("cuda", "sharpened")]
    usual = [row for row in found if (row["selector"], row["backend"]) == (DEFAULT_SELECTOR, "auto")]
    same = [row for row in found if usual and key(row, _SAME) == key(usual[0], _SAME)]
    return [row for row in same if row["selector"] is None or key(row, _METHOD) == key(usual[0], _METHOD)]


def _call(row: Row) -> Line:
    return {"call": row["case"], "kernel": kernel_name(row)}


def _replayed(row: Row) -> str:
    return row["case"] + (', graph="auto"' if row["graph"] == "auto" else "")


def _selected_as_it_comes(row: Row) -> bool:
    shown = row["length"] in (32768, 131072) and (row["workload"], row["head_dim"]) == ("sharpened", 128)
    return shown and "select_ms" in row and not changed_settings(row["selector"], row["settings"])


HOST = Table(
    group_by="length gpu heads kv_heads head_dim dtype",
    identity="case graph",
    caption="**{length:,} tokens**: medians of calls, each with an idle GPU before it",
    lines=lambda rows: pivot((_call(row), {f'graph="{row["graph"]}", µs': field(row, "host_us:,.0f")}) for row in rows),
    where=lambda row: "graph" in row and "host_us" in row,  # others are of whole prefills, or say nothing of graphs
)
PREFILL = Table(
    group_by="model model_sha256 gpu dtype",
    identity="length case graph",
    caption="**Prefill of the {model} model in transformers, uncompiled**: medians by wall clock, in turns, ms",
    lines=lambda rows: pivot(
        ({"tokens": f"{row['length']:,}"}, {_replayed(row): field(row, "prefill_ms:.2f")}) for row in rows
    ),
    where=lambda row: "prefill_ms" in row,
)
SELECTION = Table(
    group_by="gpu heads kv_heads head_dim dtype workload",
    identity="selector settings length",
    caption="**Selection for all heads of one layer**, ms, settings as they come",
    lines=lambda rows: pivot(
        ({"selector": method(row)}, {f"{row['length']:,} tokens": field(row, "select_ms:ms")}) for row in rows
    ),
    where=_selected_as_it_comes,
)


def demo_table(rows: Sequence[Row]) -> str:
    """The latest run of the demo."""
    if not rows:
        return ""
    row = rows[-1]
    columns = {
        "answer": lambda part: f"{part['answer']} {'right' if part['correct'] else 'wrong'}",
        "seconds": "prefill_seconds:.2f",
        "compile s": "compile_seconds:.1f",
        "density": "density:.3f",
        "speed-up": "speedup:x",
    }
    speedup = {"speedup": row["dense"]["prefill_seconds"] / row["sparse"]["prefill_seconds"]}
    parts = {"dense": row["dense"], "sparse": row["sparse"] | speedup}
    lines = [{"prefill": name} | cells(part, columns) for name, part in parts.items()]
    fields: Any = get_selector(row["selector"])
    settings = settings_of({one.name: row.get(one.name) for one in dataclasses.fields(fields)})
    return (
        f"{markdown(lines)}\n\n({row['prompt']['tokens']:,} tokens on "
        f"{conditions([row], 'gpu dtype torch commit date')}; {row['selector']}, {settings}; the prefill time includes "
        "selection.)"
    )
