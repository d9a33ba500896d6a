"""What a needle model can do, in numbers from its evaluation: for its card and the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from bench.tables import Table, conditions, field, pivot, values
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


def _title(length: int) -> str:
    return f"{length:,} tokens"


def _mark(rows: Sequence[Row]) -> str:
    return " It is `flexprefill_fa/tools/needle/model`." if rows[0]["model_sha256"] == _shipped() else ""


def _shipped() -> str:
    return model_sha256(MODEL_DIR)


RUNS = Table(
    group_by="model_sha256 asked_sha256 seed gpu torch python",
    identity="task length",
    caption="**SHA-256 {model_sha256:.10}**: share of whole answers that are right after dense prefill, bfloat16",
    lines=lambda rows: pivot(
        (({"task": row["task"]}, {_title(row["length"]): field(row, "exact:.3f")}) for row in rows),
        map(_title, values(rows, "length")),
    ),
    notes=lambda rows: f"Questions of each task: {questions_of(rows)}.{_mark(rows)}",
)
"""The accuracies of one model under one set of conditions."""


def run_tables(rows: Iterable[Row]) -> str:
    """The accuracies of each model that rows are of, the one of this checkout first and marked."""
    return RUNS.markdown(sorted(rows, key=lambda row: row["model_sha256"] != _shipped()))
