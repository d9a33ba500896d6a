"""What a needle model can do, in numbers from its evaluation: for its card and the documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.tables import Column, Table, across, distinct, pivot, values
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row


def conditions_of(rows: Sequence[Row]) -> str:
    """Where the accuracies were measured; where versions, commits or dates differ, each is named."""
    words = {"gpu": "", "torch": "torch ", "python": "Python ", "commit": "commit ", "date": ""}
    return ", ".join(f"{word}{found}" for name, word in words.items() if (found := distinct(rows, name)))


def questions_of(rows: Sequence[Row]) -> str:
    """How many questions of a task each length had."""
    found = pivot(rows, lambda row: row["samples"], lambda row: row["length"])
    return "; ".join(
        f"{samples} at {', '.join(f'{length:,}' for length in sorted(found[samples]))} tokens"
        for samples in sorted(found, reverse=True)
    )


def _columns(rows: list[Row]) -> list[Column]:
    """Of lines that are a task's rows by length."""
    titles = {length: f"{length:,} tokens" for length in values(rows, "length")}
    told: Column = "task", lambda line: next(iter(line.values()))["task"]
    return [told, *across(titles, lambda row: f"{row['exact']:.3f}")]


def _caption(rows: list[Row]) -> str:
    model = rows[0]["model_sha256"]
    return (
        f"**SHA-256 {model[:10]}**{' (`flexprefill_fa/tools/needle/model`)' if model == _shipped() else ''}: share of "
        "whole answers that are right after dense prefill, bfloat16. Questions of each task: "
        f"{questions_of(rows)}. {conditions_of(rows)}."
    )


def _shipped() -> str:
    return model_sha256(MODEL_DIR)


RUNS = Table(
    group_by=("model_sha256", "asked_sha256", "seed", "gpu", "torch", "python"),
    identity=("task", "length"),
    lines=lambda rows: pivot(rows, lambda row: row["task"], lambda row: row["length"]).values(),
    columns=_columns,
    caption=_caption,
)
"""The accuracies of one model under one set of conditions."""


def run_tables(rows: Iterable[Row]) -> str:
    """The accuracies of each model that rows are of, the one of this checkout first and marked."""
    return RUNS.markdown(sorted(rows, key=lambda row: row["model_sha256"] != _shipped()))
