"""The tables of the serving engines: the default backend beside the same engine with sparse prefill."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.tables import Line, Table, conditions, field, number
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
_SPARSE = "sparse prefill"


def serve_tables(*files: Iterable[Row]) -> str:
    """One table for each engine and GPU, of the rows of all files; empty without rows."""
    return _TABLE.markdown(itertools.chain(*files))


def _lines(rows: Sequence[Row]) -> list[Line]:
    """A line for all that was measured with both backends."""
    default = {(row["measure"], row["length"]): row for row in rows if row["backend"] == "default"}
    lines = []
    for row in rows:
        before = default.get((row["measure"], row["length"]))
        if row["backend"] != _SPARSE or before is None:
            continue
        title, name, more = _MEASURES[row["measure"]]
        ratio = row[name] / before[name] if more else before[name] / row[name]
        line = {"measured": title.format(**row), "density of sparse chunks": field(row, "density:.3f")}
        line[f"{ENGINES[row['kind']].title}'s default backend"] = number(before[name], "ms")
        lines.append(line | {"with sparse prefill": number(row[name], "ms"), "speed-up": number(ratio, "x")})
    return lines


def _gather(rows: Sequence[Row]) -> str:
    """What reading the paged cache costs, beside the rest of the chunk."""
    gathered = [row for row in rows if row["backend"] == "gather"]
    told = conditions(gathered, "length q_len gather_ms select_ms attend_ms")
    return f"One layer of the last chunk, with its keys gathered from the paged cache: {told}." if told else ""


_TABLE = Table(
    group_by=" ".join(("kind gpu model layers", *(engine.step_tokens for engine in ENGINES.values()))),
    identity="backend measure length settings synthetic_density",
    caption="**{model}**: wall clock of the whole engine, first token: median of the repeats, fewest of the longest "
    "prompts, other rows: one run each. The sparse engine selects in full and then attends over seeded random blocks",
    lines=_lines,
    notes=_gather,
    told="dense_kernel dtype settings synthetic_density",
)
