"""The accuracies of trained needle models as tables: of the one that is shipped, and of others made the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.needle.card import accuracy_table, conditions_of, questions_of
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row, latest

_CONDITIONS = ("model_sha256", "asked_sha256", "seed", "gpu", "torch", "python")
"""What the rows of a table have in common."""


def run_tables(rows: Iterable[Row]) -> str:
    """The accuracies of each model that rows are of, the one of this checkout marked.

    Of the rows of a task and length under the same conditions, the one with the most questions counts, then the last.
    """
    tables: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["samples"]):
        tables.setdefault(tuple(row.get(name) for name in _CONDITIONS), []).append(row)
    shipped = model_sha256(MODEL_DIR)
    found = [latest(table, lambda row: (row["task"], row["length"])) for table in tables.values()]
    found.sort(key=lambda table: table[0]["model_sha256"] != shipped)
    return "\n\n".join(_run_table(table, table[0]["model_sha256"] == shipped) for table in found)


def _run_table(rows: Sequence[Row], shipped: bool) -> str:
    where = " (`flexprefill_fa/tools/needle/model`)" if shipped else ""
    return (
        f"**SHA-256 {rows[0]['model_sha256'][:10]}**{where}: share of whole answers that are right after dense "
        f"prefill, bfloat16. Questions of each task: {questions_of(rows)}. {conditions_of(rows)}.\n\n"
        f"{accuracy_table(rows)}"
    )
