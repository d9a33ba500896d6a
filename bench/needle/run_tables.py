"""The accuracies of trained needle models as tables: of the one that is shipped, and of others made the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.needle import MODEL_DIR
from bench.needle.card import accuracy_table, questions_of
from bench.tables import distinct
from flexprefill_fa.digests import model_sha256
from flexprefill_fa.rows import Row, latest

_TOLD = {"gpu": "", "torch": "torch ", "commit": "commit ", "date": ""}
_IDENTITY = ("model_sha256", "task", "length", "gpu", "seed")


def run_tables(rows: Iterable[Row]) -> str:
    """The accuracies of each model that rows are of, the one of this checkout marked."""
    models: dict[str, list[Row]] = {}
    for row in latest(rows, lambda row: tuple(row[name] for name in _IDENTITY)):
        models.setdefault(row["model_sha256"], []).append(row)
    shipped = model_sha256(MODEL_DIR)
    return "\n\n".join(_run_table(found, model == shipped) for model, found in models.items())


def _run_table(rows: Sequence[Row], shipped: bool) -> str:
    where = " (`bench/needle/model`)" if shipped else ""
    told = ", ".join(f"{word}{distinct(rows, name)}" for name, word in _TOLD.items())
    return (
        f"**SHA-256 {rows[0]['model_sha256'][:10]}**{where}: share of whole answers that are right after dense "
        f"prefill, bfloat16. Questions of each task: {questions_of(rows)}. {told}.\n\n{accuracy_table(rows)}"
    )
