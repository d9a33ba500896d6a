"""Tables of speed from result rows: Markdown, each under a line that says what it was measured on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.attention import YARDSTICK
from bench.report import number
from flexprefill_fa.masks import get_selector
from flexprefill_fa.tools.rows import Row, latest

GROUP_KEYS = ("device", "gpu", "batch", "heads", "kv_heads", "head_dim", "dtype", "workload", "layer", "model_sha256")
KERNEL_NAMES = {
    "sdpa": "SDPA",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "FLASH": "FlexAttention FLASH",
    "TRITON": "FlexAttention TRITON",
    "CPU": "FlexAttention CPU",
}


def attention_tables(rows: Iterable[Row], device: str, workload: str) -> str:
    """One table for each processor, shape and selector: what each length costs, beside dense attention."""
    return _each_group(rows, device, workload, _attention_table, synthetic=False)


def density_tables(rows: Iterable[Row]) -> str:
    """One table for each processor, shape and workload: throughput of the attention alone at exact densities."""
    workloads = dict.fromkeys(row["workload"] for row in rows if row["selector"] == "synthetic")
    tables = (_each_group(rows, "cuda", workload, _density_table, synthetic=True) for workload in workloads)
    return "\n\n".join(filter(None, tables))


def measured(row: Row) -> str:
    """What tells one measurement from another; a later row of the same takes an earlier one's place."""
    names = [*GROUP_KEYS, "length", "selector", "settings", "backend", "implementation", "module", "function"]
    kernel = row["kernel"] if row["selector"] is None else None
    return json.dumps([kernel, *(row.get(name) for name in names)])


def groups(rows: Iterable[Row], device: str, workload: str, *, synthetic: bool) -> list[tuple[list[Row], list[Row]]]:
    """(dense rows, rows of one selector) of the latest measurements that belong in one table."""
    found: dict[str, tuple[list[Row], dict[str, list[Row]]]] = {}
    for row in latest(rows, measured):
        if (row["device"], row["workload"]) != (device, workload):
            continue
        dense, selected = found.setdefault(json.dumps([row.get(key) for key in GROUP_KEYS]), ([], {}))
        if row["selector"] is None:
            dense.append(row)
        elif (row["selector"] == "synthetic") == synthetic:
            name = "synthetic" if synthetic else json.dumps([row["selector"], row["settings"]])
            selected.setdefault(name, []).append(row)
    return [(dense, part) for dense, selected in found.values() for part in selected.values()]


def _each_group(
    rows: Iterable[Row],
    device: str,
    workload: str,
    table: Callable[[list[Row], list[Row]], str],
    *,
    synthetic: bool,
) -> str:
    return "\n\n".join(table(*group) for group in groups(rows, device, workload, synthetic=synthetic))


def _attention_table(dense: list[Row], selected: list[Row]) -> str:
    yardstick = YARDSTICK[selected[0]["device"]]
    explicit = list(dict.fromkeys(row["backend"] for row in selected if row["backend"] != "auto"))
    header = ["tokens", "density", "recall", f"{KERNEL_NAMES[yardstick]} ms", "best dense ms", "select ms"]
    for title in ("attend ms", "total ms", f"x {KERNEL_NAMES[yardstick]}", "x best dense"):
        header += [f"{title}, {name}" if len(explicit) > 1 else title for name in explicit]
    corrected = [name for name in explicit if any(row["backend"] == name and "corrected_ms" in row for row in selected)]
    header += [f"mean correction, {name}" for name in corrected]
    header.append("`auto`")
    lines = []
    for length in sorted({row["length"] for row in selected}):
        by_backend = {row["backend"]: row for row in selected if row["length"] == length}
        dense_ms = {row["kernel"]: row.get("total_ms") for row in dense if row["length"] == length}
        sparse = next((row for row in by_backend.values() if row["path"] == "sparse"), {})
        select = next((row["select_ms"] for row in by_backend.values() if row.get("select_ms") is not None), None)
        cells = [f"{length:,}", number(sparse.get("density"), ".3f"), number(sparse.get("recall"), ".3f")]
        cells += [milliseconds(dense_ms.get(yardstick)), _best(dense_ms), milliseconds(select)]
        shown = [by_backend.get(name, {}) for name in explicit]
        cells += [milliseconds(row.get("attend_ms")) for row in shown]
        cells += ["wrong" if "error" in row else milliseconds(row.get("total_ms")) for row in shown]
        for field in (f"speedup_{yardstick}", "speedup_best_dense"):
            cells += [times(row.get(field)) for row in shown]
        cells += [_correction(by_backend.get(name, {})) for name in corrected]
        cells.append(_auto(by_backend.get("auto"), yardstick))
        lines.append(cells)
    return f"{caption(dense + selected, selector_of(selected[0]))}\n\n{markdown_table(header, lines)}"


def _density_table(dense: list[Row], selected: list[Row]) -> str:
    header = ["tokens", "density", "kernel", "attend ms", "TFLOP/s", "share of its dense TFLOP/s", "x best dense"]
    lines = []
    for row in sorted(selected, key=lambda row: (row["length"], row["density"], row["kernel"])):
        if row["backend"] == "auto":
            continue
        cells = [f"{row['length']:,}", f"{row['density']:.3f}", row["kernel"]]
        cells.append("wrong" if "error" in row else milliseconds(row.get("attend_ms")))
        cells += [number(row.get("tflops"), ".0f"), number(row.get("share_of_dense_tflops"), ".0%")]
        lines.append([*cells, times(row.get("speedup_best_dense"))])
    what = "random blocks of an exact density, attention alone, without a selection"
    return f"{caption(dense + selected, what)}\n\n{markdown_table(header, lines)}"


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
        lines.append([*cells, times(row["dense"]["prefill_seconds"] / part["prefill_seconds"])])
    table = markdown_table(["prefill", "answer", "seconds", "compile s", "density", "speed-up"], lines)
    recalls = [layer["recall"] for layer in row["sparse"].get("layers", ()) if layer["recall"] is not None]
    recall = ""
    if recalls:
        worst = min(layer["lowest_recall"] for layer in row["sparse"]["layers"])
        recall = f" Mean recall per layer {min(recalls):.2f} to {max(recalls):.2f}, worst head {worst:.2f}."
    selector = row.get("selector", "flexprefill")  # the demo's only one, once
    fields: Any = get_selector(selector)
    told = [
        f"{field.name} {row[field.name]}" for field in dataclasses.fields(fields) if row.get(field.name) is not None
    ]
    settings = ", ".join([selector, *told])
    where = f"{row['prompt']['tokens']:,} tokens on {row['gpu']}; {row['dtype']}, torch {row['torch']}"
    when = f"commit {row['commit']}, {row['date']}"
    return f"{table}\n\n({where}, {when}; {settings}; the prefill time includes selection.{recall})"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def caption(rows: Sequence[Row], what: str) -> str:
    """Conditions of a table's rows; where they differ, each is named."""
    row = rows[0]
    workload = _WORKLOADS[row["workload"]].format(layer=row.get("layer"), model=(row.get("model_sha256") or "")[:10])
    timed = sorted({how for row in rows for how in row.get("timed_by", {}).values()} - {"wall clock"}) or ["wall clock"]
    repeats = sorted({row["repeats"] for row in rows if "repeats" in row})
    count = "-".join(map(str, dict.fromkeys((repeats[0], repeats[-1])))) if repeats else "no"
    return f"{workload}; {what}. {conditions(rows)}; median of {count} runs by {' and '.join(timed)}."


def conditions(rows: Sequence[Row]) -> str:
    """Processor, versions, commit, date and shapes; where versions, commits or dates differ, each is named."""
    row = rows[0]
    versions = [f"{title} {distinct(rows, name)}" for name, title in VERSIONS if distinct(rows, name)]
    shape = f"batch {row['batch']}, {row['heads']}/{row['kv_heads']} heads, head_dim {row['head_dim']}, {row['dtype']}"
    return f"{row['gpu']}, {', '.join(versions)}, commit {distinct(rows, 'commit')}, {distinct(rows, 'date')}; {shape}"


def distinct(rows: Sequence[Row], name: str) -> str:
    """The values of a field, each once."""
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))


VERSIONS = (("torch", "torch"), ("triton", "triton"), ("flash_attn_4", "flash-attn-4"))
_WORKLOADS = {
    "sharpened": "**Heads that get sharper with length**",
    "fixed": "**The same heads at every length**",
    "needle": "**Layer {layer} of the needle model (SHA-256 {model}) on a needle prompt**",
}


def selector_of(row: Row) -> str:
    """A selector with its settings, for a caption."""
    settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items() if value is not None)
    return f"{row['selector']}, {settings}; total includes selection"


def _best(dense_ms: dict[str, float | None]) -> str:
    ran = {kernel: ms for kernel, ms in dense_ms.items() if ms is not None}
    if not ran:
        return "-"
    best = min(ran, key=ran.__getitem__)
    return f"{milliseconds(ran[best])} ({KERNEL_NAMES[best]})"


def _auto(row: Row | None, yardstick: str) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "wrong"
    return (
        f"{row['path']} {row['kernel']}: {milliseconds(row['total_ms'])} ms, {times(row.get(f'speedup_{yardstick}'))}"
    )


def _correction(row: Row) -> str:
    """What mean correction adds to the attention's time."""
    if "corrected_ms" not in row:
        return "-"
    return f"+{row['corrected_ms'] / row['attend_ms'] - 1:.0%} of attend"


def milliseconds(value: Any) -> str:
    """Milliseconds, or a dash where there are none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float | None) -> str:
    """A speed-up, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}x"
