"""The tables of the serving engines: the default backend beside the same engine with sparse prefill."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.tables import markdown_table
from flexprefill_fa.tools.rows import Row, latest


class Engine(NamedTuple):
    """How an engine is written, and what it calls the most prompt tokens of a step: a field of its rows too."""

    title: str
    step_tokens: str


ENGINES = {"vllm": Engine("vLLM", "max_num_batched_tokens"), "sglang": Engine("SGLang", "chunked_prefill_size")}
"""By the kind of their rows."""

_GROUP = ("kind", "gpu", "model", "layers", *(engine.step_tokens for engine in ENGINES.values()))
_MEASURES = {
    "first token": ("{length:,} tokens: first token, ms", "ttft_ms", False),
    "prefill": ("{requests} x {length:,} tokens at once: prompt tokens/s", "prompt_tokens_per_s", True),
    "decode": ("{requests} requests decoding: tokens/s", "tokens_per_s", True),
}
_VERSIONS = (
    *((kind, engine.title) for kind, engine in ENGINES.items()),
    *(("torch", "torch"), ("triton", "triton"), ("flash_attn_4", "flash-attn-4")),
)


def serve_tables(rows: Iterable[Row]) -> str:
    """One table for each GPU and engine; empty without rows."""
    found: dict[str, list[Row]] = {}
    for row in latest(rows, _measured):
        found.setdefault(json.dumps([row.get(name) for name in _GROUP]), []).append(row)
    return "\n\n".join(filter(None, map(_table, found.values())))


def _measured(row: Row) -> str:
    names = (*_GROUP, "backend", "measure", "length", "settings", "synthetic_density")
    return json.dumps([row.get(name) for name in names])


def _table(rows: Sequence[Row]) -> str:
    def of(backend: str) -> dict[tuple[str, int], Row]:
        return {(row["measure"], row["length"]): row for row in rows if row["backend"] == backend}

    default, sparse = of("default"), of("sparse prefill")
    lines = []
    for key, row in sparse.items():
        other = default.get(key)
        if other is None:
            continue
        title, field, more_is_better = _MEASURES[row["measure"]]
        ratio = row[field] / other[field] if more_is_better else other[field] / row[field]
        density = "-" if row["density"] is None else f"{row['density']:.3f}"
        lines.append([title.format(**row), density, _number(other[field]), _number(row[field]), f"{ratio:.2f}x"])
    if not lines:
        return ""
    header = ["", "density of sparse chunks", f"{_engine(rows).title}'s default backend", "with sparse prefill", ""]
    return "\n\n".join(filter(None, (_caption(rows), markdown_table(header, lines), _gather(rows))))


def _engine(rows: Sequence[Row]) -> Engine:
    return ENGINES[rows[0]["kind"]]


def _caption(rows: Sequence[Row]) -> str:
    row, engine = next(row for row in rows if row["backend"] == "sparse prefill"), _engine(rows)
    versions = [f"{title} {row[name]}" for name, title in _VERSIONS if row.get(name)]
    settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items()) or "default settings"
    return (
        f"**{row['model']}**, {row['layers']} layers, {row['dtype']}, {engine.step_tokens} "
        f"{row[engine.step_tokens]:,}; default backend: {row.get('dense_kernel') or f'as {engine.title} chose'}. "
        f"Random weights have no attention pattern: the sparse engine selects in full ({settings}) and then attends "
        f"over seeded random blocks of {row['synthetic_density']:.0%} density. {row['gpu']}, {', '.join(versions)}, "
        f"commit {row['commit']}, {row['date']}; wall clock of the whole engine. First token: {_samples(rows)}; the "
        "other rows: one run each."
    )


def _samples(rows: Sequence[Row]) -> str:
    """Of how many prompts the first token's times are medians."""
    counts = [row["repeats"] for row in rows if row["measure"] == "first token"]
    if not counts:
        return "not measured"
    low, high = min(counts), max(counts)
    return f"medians of {low} prompts" if low == high else f"medians of {low} (longest prompts) to {high}"


def _gather(rows: Sequence[Row]) -> str:
    """What reading the paged cache costs, beside the rest of the chunk."""
    row = next((row for row in rows if row["backend"] == "gather"), None)
    if row is None:
        return ""
    total = row["gather_ms"] + row["select_ms"] + row["attend_ms"]
    return (
        f"One layer of the last chunk, {row['q_len']:,} queries over {row['length']:,} keys: gathering the keys and "
        f"values from the paged cache {row['gather_ms']:.2f} ms ({row['gather_ms'] / total:.0%}), selection "
        f"{row['select_ms']:.2f} ms, attention {row['attend_ms']:.2f} ms."
    )


def _number(value: Any) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
