"""The tables of time: of the attention alone, of other implementations, and of the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from bench.planning import YARDSTICK
from bench.tables import (
    KERNEL_NAMES,
    Column,
    Table,
    across,
    column,
    commits,
    conditions,
    markdown_table,
    method,
    number,
    pivot,
    settings_of,
    split,
)
from flexprefill_fa.masks import get_selector
from flexprefill_fa.masks.selector import DEFAULT_SELECTOR
from flexprefill_fa.tools.rows import Row

OURS = "flexprefill_fa"
_WORKLOADS = {
    "sharpened": "**Heads that get sharper with length**",
    "fixed": "**The same heads at every length**",
    "needle": "**Layer {layer} of the needle model (SHA-256 {model_sha256:.10}) on a needle prompt**",
    "model": "**Layer {layer} of {model} (SHA-256 {model_sha256:.10}) on the text {text}**",
}
_LONG = 524288  # tokens
_TABLE: dict[str, Any] = {
    "group_by": (
        *("device", "gpu", "batch", "heads", "kv_heads", "head_dim", "dtype"),
        *("workload", "layer", "model_sha256", "text"),
    ),
    "identity": ("kernel", "length", "selector", "settings", "backend", "implementation", "module", "function"),
}


def _caption(rows: Sequence[Row], what: str) -> str:
    row = rows[0]
    workload = _WORKLOADS[row["workload"]].format(**row)
    timed = sorted({how for row in rows for how in row.get("timed_by", {}).values()} - {"wall clock"}) or ["wall clock"]
    repeats = sorted({row["repeats"] for row in rows if "repeats" in row})
    count = "-".join(map(str, dict.fromkeys((repeats[0], repeats[-1])))) if repeats else "no"
    return f"{workload}; {what}. {conditions(rows)}; median of {count} runs by {' and '.join(timed)}."


def selector_caption(rows: Sequence[Row]) -> str:
    """Of a selector's rows, and of the dense rows before them."""
    row = rows[-1]
    return _caption(rows, f"{row['selector']}, {settings_of(row['settings'])}; total includes selection")


Line = dict[Any, Row]
"""What was measured at one length: a selector's rows by backend, dense rows by (kernel,)."""


def by_length(rows: Iterable[Row]) -> dict[int, Line]:
    """A line for each length that a selector was measured at, ascending."""
    found = pivot(rows, lambda row: row["length"], lambda row: row["backend"] if row["selector"] else (row["kernel"],))
    return {length: line for length, line in sorted(found.items()) if split(line.values())[1]}


def best_dense(rows: Iterable[Row], kernel: str | None = None) -> tuple[float, str] | None:
    """Milliseconds and name of the fastest dense kernel among rows, or of a named one."""
    dense = [row for row in split(rows)[0] if "total_ms" in row and kernel in (None, row["kernel"])]
    return min(((row["total_ms"], row["kernel"]) for row in dense), default=None)


def _attention_columns(rows: list[Row]) -> list[Column]:
    selected = split(rows)[1]
    yardstick = YARDSTICK[rows[0]["device"]]
    explicit = list(dict.fromkeys(row["backend"] for row in selected if row["backend"] != "auto"))

    def each(title: str, cell: Any, names: Sequence[str] = explicit, named: bool = len(explicit) > 1) -> list[Column]:
        return across({name: f"{title}, {name}" if named else title for name in names}, cell)

    def sparse(title: str, name: str, spec: str) -> Column:
        """A field of the first row that has it and did not go dense."""

        def cell(line: Line) -> str:
            found = (row.get(name) for row in split(line.values())[1] if row["path"] == "sparse")
            return number(next((value for value in found if value is not None), None), spec)

        return title, cell

    def dense(line: Line, kernel: str | None = None) -> str:
        found = best_dense(line.values(), kernel)
        if found is None:
            return "-"
        return number(found[0], "ms") + ("" if kernel else f" ({KERNEL_NAMES[found[1]]})")

    def auto(row: Row) -> str:
        if "error" in row:
            return "wrong"
        speedup = number(row.get(f"speedup_{yardstick}"), "x")
        return f"{row['path']} {row['kernel']}: {number(row['total_ms'], 'ms')} ms, {speedup}"

    def correction(row: Row) -> str:
        means = {"corrected_ms": "", "tilted_ms": "tilted "}
        more = [f"{means[name]}+{row[name] / row['attend_ms'] - 1:.0%}" for name in means if name in row]
        return f"{' / '.join(more)} of attend" if more else "-"

    corrected = [name for name in explicit if any(row["backend"] == name and "corrected_ms" in row for row in selected)]
    return [
        ("tokens", lambda line: f"{next(iter(line.values()))['length']:,}"),
        sparse("density", "density", ".3f"),
        sparse("recall", "recall", ".3f"),
        (f"{KERNEL_NAMES[yardstick]} ms", partial(dense, kernel=yardstick)),
        ("best dense ms", dense),
        sparse("select ms", "select_ms", "ms"),
        *each(*column("attend ms", "attend_ms", "ms")),
        *each("total ms", lambda row: "wrong" if "error" in row else number(row.get("total_ms"), "ms")),
        *each(*column(f"x {KERNEL_NAMES[yardstick]}", f"speedup_{yardstick}", "x")),
        *each(*column("x best dense", "speedup_best_dense", "x")),
        *each("mean correction", correction, corrected, True),
        *each("`auto`", auto, ["auto"], False),
    ]


def _memory(rows: Sequence[Row]) -> str:
    """Of the longest prompts, which is what limits them."""
    told = [row for row in rows if row["length"] >= _LONG and "peak_total_bytes" in row and row["selector"]]
    sizes = {row["length"]: row["peak_total_bytes"] / 2**30 for row in told}
    calls = [f"of {length:,} tokens {size:.1f} GiB" for length, size in sorted(sizes.items())]
    return f"A call takes, inputs and output included: {', '.join(calls)}." if calls else ""


ATTENTION = Table(
    **_TABLE,
    notes=_memory,
    each=("selector", "settings"),
    where=lambda row: row["selector"] != "synthetic",
    lines=lambda rows: by_length(rows).values(),
    columns=_attention_columns,
    caption=selector_caption,
)
"""What each length costs with a selector, beside dense attention."""

DENSITY = Table(
    **_TABLE,
    each=("selector",),
    where=lambda row: row["selector"] in (None, "synthetic"),
    lines=lambda rows: sorted(
        (row for row in split(rows)[1] if row["backend"] != "auto"),
        key=lambda row: (row["length"], row["density"], row["kernel"]),
    ),
    columns=lambda rows: [
        column("tokens", "length", ","),
        column("density", "density", ".3f"),
        column("kernel", "kernel"),
        ("attend ms", lambda row: "wrong" if "error" in row else number(row.get("attend_ms"), "ms")),
        column("TFLOP/s", "tflops", ".0f"),
        column("share of its dense TFLOP/s", "share_of_dense_tflops", ".0%"),
        column("x best dense", "speedup_best_dense", "x"),
    ],
    caption=partial(_caption, what="random blocks of an exact density, attention alone, without a selection"),
)
"""Throughput of the attention alone at exact densities."""


def attention_tables(rows: Iterable[Row], device: str, workload: str) -> str:
    """The tables of a kind of processor and of inputs."""
    return ATTENTION.markdown(row for row in rows if (row["device"], row["workload"]) == (device, workload))


def shown_first(rows: Iterable[Row]) -> list[Row]:
    """The rows that the plot and the README show; none without rows of a GPU.

    They are of the selector that runs where none is named, if "auto" was measured with it, else of the first table.
    """
    groups = ATTENTION.groups(row for row in rows if row["device"] == "cuda" and row["workload"] == "sharpened")
    usual = [
        group
        for group in groups
        if any(row["selector"] == DEFAULT_SELECTOR and row["backend"] == "auto" for row in group)
    ]
    return next(iter(usual or groups), [])


# Other implementations.


def _compared(rows: list[Row]) -> list[Row]:
    """A line for each; those of "auto" where no backend of the method was named, peers behind ours."""
    named = {(row["length"], method(row)) for row in rows if row["backend"] not in (None, "auto")}
    shown = [row for row in rows if row["backend"] != "auto" or (row["length"], method(row)) not in named]
    order = list(dict.fromkeys(map(method, shown)))
    return sorted(shown, key=lambda row: (row["length"], order.index(method(row)), row["path"] == "peer"))


def _implementation(row: Row) -> str:
    if row["selector"] is None:
        return KERNEL_NAMES[row["kernel"]]
    if row["path"] == "peer":
        return str(row["implementation"])
    return f"{OURS} {row['backend']}" + (f" (dense {row['kernel']})" if row["path"] == "dense" else "")


def _dense_error(row: Row) -> float | None:
    return None if "error" in row else row.get("dense_error" if row["selector"] else "check_error")


def _failed(row: Row, name: str) -> str:
    """A time, or in its place the error; a table cell holds one line without bars."""
    return f"error: {row['error']}".replace("|", "/") if "error" in row else number(row.get(name), "ms")


def _against(rows: list[Row], name: str, yardstick: str | None = None) -> list[Column]:
    """How a time compares with dense attention of the same length, in whichever process that ran; and its clock."""

    def over(row: Row, kernel: str | None) -> str:
        found = best_dense((other for other in rows if other["length"] == row["length"]), kernel)
        return number(found[0] / row[name] if found and name in row and row["selector"] is not None else None, "x")

    return [
        *([(f"x {KERNEL_NAMES[yardstick]}", partial(over, kernel=yardstick))] if yardstick else []),
        ("x best dense", partial(over, kernel=None)),
        ("timed by", lambda row: row.get("timed_by", {}).get(name, "-")),
    ]


def _origin(row: Row) -> str:
    """Whose code a peer's row ran, and which state of it."""
    version = f" {row['peer_version']}" if row["peer_version"] else ""
    return f"{row['implementation']}{version}, `{row['module']}.{row['function']}`, digest {row['peer_digest']}"


def _peer_notes(rows: list[Row]) -> str:
    """Settings and origin of what is compared, each once."""
    notes = []
    for row in split(_compared(rows))[1]:
        who, settings = f"{OURS}, {row['selector']}", row["settings"]
        if row["path"] == "peer":
            who, settings = _origin(row), row.get("peer_settings")
        notes.append(f"- {who}: {settings_of(settings) if settings else 'not called'}")
    return "\n".join(dict.fromkeys(notes))


PEERS = Table(
    **_TABLE,
    where=lambda row: row["selector"] != "synthetic",
    lines=_compared,
    columns=lambda rows: [
        column("tokens", "length", ","),
        ("method", method),
        ("implementation", _implementation),
        column("density", "density", ".3f"),
        ("error against dense", lambda row: number(_dense_error(row), ".2g")),
        column("select ms", "select_ms", "ms"),
        ("total ms", lambda row: _failed(row, "total_ms")),
        column("wall clock ms", "total_eager_ms", "ms"),
        *_against(rows, "total_ms", YARDSTICK[rows[0]["device"]]),
    ],
    caption=lambda rows: _caption(_compared(rows), "each implementation on the same values, selection included"),
    notes=_peer_notes,
)
"""This package beside other implementations."""

GIVEN = Table(
    **_TABLE,
    where=lambda row: row["selector"] in (None, "synthetic"),
    lines=lambda rows: split(_compared(rows))[1],
    columns=lambda rows: [
        column("tokens", "length", ","),
        column("density", "density", ".3f"),
        ("implementation", _implementation),
        column("error", "check_error", ".2g"),
        ("attend ms", lambda row: _failed(row, "attend_ms")),
        *_against(rows, "attend_ms"),
    ],
    caption=partial(_caption, what="the same random blocks for each, one choice for the query heads of a kv head"),
    notes=lambda rows: "\n".join(dict.fromkeys(f"- {_origin(row)}" for row in rows if row["path"] == "peer")),
)
"""Attention alone of this package and others, over the same blocks."""


def demo_table(rows: Sequence[Row]) -> str:
    """The latest run of the demo."""
    if not rows:
        return ""
    row = rows[-1]
    lines = []
    for name, title in (("dense", "dense SDPA"), ("sparse", "sparse")):
        part = row[name]
        cells = [title, f"{part['answer']} {'right' if part['correct'] else 'wrong'}", f"{part['prefill_seconds']:.2f}"]
        cells += [number(part.get("compile_seconds"), ".1f"), number(part.get("density"), ".3f")]
        lines.append([*cells, number(row["dense"]["prefill_seconds"] / part["prefill_seconds"], "x")])
    recall = ""
    if layers := [layer for layer in row["sparse"].get("layers", ()) if layer["recall"] is not None]:
        found = [layer["recall"] for layer in layers]
        worst = min(layer["lowest_recall"] for layer in layers)
        recall = f" Mean recall per layer {min(found):.2f} to {max(found):.2f}, worst head {worst:.2f}."
    selector = row.get("selector", "flexprefill")  # the demo's only one, once
    fields: Any = get_selector(selector)
    settings = settings_of({field.name: row.get(field.name) for field in dataclasses.fields(fields)})
    where = f"{row['prompt']['tokens']:,} tokens on {row['gpu']}; {row['dtype']}, torch {row['torch']}"
    table = markdown_table(["prefill", "answer", "seconds", "compile s", "density", "speed-up"], lines)
    return (
        f"{table}\n\n({where}, {commits([row])}; {selector}, {settings}; the prefill time includes selection.{recall})"
    )
