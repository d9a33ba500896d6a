"""The tables of the serving engines: the default backend beside the same engine with sparse prefill."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.tables import Table, commits, number, pivot, settings_of, values, versions
from flexprefill_fa.tools.rows import Row


class Engine(NamedTuple):
    """How an engine is written, and what it calls the most prompt tokens of a step: a field of its rows too."""

    title: str
    step_tokens: str


ENGINES = {"vllm": Engine("vLLM", "max_num_batched_tokens"), "sglang": Engine("SGLang", "chunked_prefill_size")}
"""By the kind of their rows."""

# By measure: what a line says, the field, and whether more is better.
_MEASURES = {
    "first token": ("{length:,} tokens: first token, ms", "ttft_ms", False),
    "prefill": ("{requests} x {length:,} tokens at once: prompt tokens/s", "prompt_tokens_per_s", True),
    "decode": ("{requests} requests decoding: tokens/s", "tokens_per_s", True),
}
_DEFAULT, _SPARSE = "default", "sparse prefill"


def serve_tables(*files: Iterable[Row]) -> str:
    """One table for each engine and GPU, of the rows of all files; empty without rows."""
    return _TABLE.markdown(itertools.chain(*files))


def _lines(rows: Sequence[Row]) -> Iterable[list[str]]:
    """A line, as cells, of all that was measured with both backends."""
    ordered = sorted(rows, key=lambda row: row["backend"] != _SPARSE)
    for pair in pivot(ordered, lambda row: (row["measure"], row["length"]), lambda row: row["backend"]).values():
        if {_DEFAULT, _SPARSE} <= set(pair):
            sparse = pair[_SPARSE]
            title, name, more = _MEASURES[sparse["measure"]]
            found = [pair[backend][name] for backend in (_DEFAULT, _SPARSE)]
            told = [format(value, ",.0f" if value >= 100 else ".1f") for value in found]
            ratio = found[more] / found[not more]
            yield [title.format(**sparse), number(sparse.get("density"), ".3f"), *told, number(ratio, "x")]


def _titles(rows: Sequence[Row]) -> list[str]:
    backend = f"{ENGINES[rows[0]['kind']].title}'s default backend"
    return ["", "density of sparse chunks", backend, "with sparse prefill", ""]


def _caption(rows: Sequence[Row]) -> str:
    row, engine = next(row for row in rows if row["backend"] == _SPARSE), ENGINES[rows[0]["kind"]]
    counts = values([row for row in rows if "repeats" in row], "repeats")  # of prompts, of the first token alone
    samples = f"{counts[0]} (longest prompts) to {counts[-1]}" if counts[1:] else f"{counts[0]} prompts"
    return (
        f"**{row['model']}**, {row['layers']} layers, {row['dtype']}, {engine.step_tokens} "
        f"{row[engine.step_tokens]:,}; default backend: {row.get('dense_kernel') or f'as {engine.title} chose'}. "
        f"Random weights have no attention pattern: the sparse engine selects in full "
        f"({settings_of(row['settings']) or 'default settings'}) and then attends over seeded random blocks of "
        f"{row['synthetic_density']:.0%} density. {row['gpu']}, {versions([row], rows[0]['kind'])}, {commits([row])}; "
        f"wall clock of the whole engine. First token: medians of {samples}; the other rows: one run each."
    )


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


_TABLE = Table(
    group_by=("kind", "gpu", "model", "layers", *(engine.step_tokens for engine in ENGINES.values())),
    identity=("backend", "measure", "length", "settings", "synthetic_density"),
    lines=_lines,
    columns=_titles,
    caption=_caption,
    notes=_gather,
)
