"""What a needle model can do, in numbers from its evaluation: for its card and the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from bench.tables import Line, Table, conditions, field, pivot, values
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row

conditions_of = partial(conditions, names="gpu torch python commit date")
"""Where the accuracies were measured."""


def questions_of(rows: Sequence[Row]) -> str:
    """How many questions of a task each length had."""
    lengths = {samples: [row for row in rows if row["samples"] == samples] for samples in values(rows, "samples")[::-1]}
    return "; ".join(
        f"{samples} at {', '.join(f'{length:,}' for length in values(found, 'length'))} tokens"
        for samples, found in lengths.items()
    )


def _lines(rows: list[Row]) -> list[Line]:
    titles = {length: f"{length:,} tokens" for length in values(rows, "length")}
    entries = (({"task": row["task"]}, {titles[row["length"]]: field(row, "exact:.3f")}) for row in rows)
    return pivot(entries, titles.values())


def _is_shipped(row: Row) -> bool:
    return row["model_sha256"] == model_sha256(MODEL_DIR)


RUNS = Table(
    group_by="model_sha256 asked_sha256 seed gpu torch python",
    identity="task length",
    caption="**SHA-256 {model_sha256:.10}**: share of whole answers that are right after dense prefill, bfloat16",
    lines=_lines,
    notes=lambda rows: (
        f"Questions of each task: {questions_of(rows)}."
        + (" It is `flexprefill_fa/tools/needle/model`." if _is_shipped(rows[0]) else "")
    ),
)


def run_tables(rows: Iterable[Row]) -> str:
    """The accuracies of each model that rows are of, the one of this checkout first and marked."""
    return RUNS.markdown(sorted(rows, key=_is_shipped, reverse=True))
