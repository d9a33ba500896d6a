"""All tasks of a model in one table: how well each selector does on average, and where it does worst."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.accuracy_tables import MARGIN, TaskTable, drawing_of, is_below, model_of, task_tables, tokens_of
from bench.tables import distinct, markdown_table
from flexprefill_fa.choice import DENSE
from flexprefill_fa.tools.rows import Row


def accuracy_summaries(rows: Iterable[Row]) -> str:
    """One table for all tasks that were asked under the same conditions; of each, the version whose rows begin last."""
    groups: dict[str, dict[str, TaskTable]] = {}
    for table in task_tables(rows):
        groups.setdefault(table.conditions, {})[table.task] = table
    return "\n\n".join(_markdown(list(tables.values())) for tables in groups.values())


def _markdown(tables: Sequence[TaskTable]) -> str:
    lengths = sorted({length for table in tables for length in table.lengths}, key=lambda length: length or 0)
    names = dict.fromkeys(line.name for table in tables for line in table.lines)
    body = [[name, *(_cell(tables, name, length) for length in lengths)] for name in names]
    return f"{_caption(tables)}\n\n{markdown_table(['selector', *map(tokens_of, lengths)], body)}"


def _cell(tables: Sequence[TaskTable], name: str, length: int | None) -> str:
    rows = [row for table in tables if (row := table.row(name, length)) is not None]
    if not rows:
        return "-"
    worst = min(rows, key=lambda row: row["accuracy"])
    asked = sum(table.row(DENSE, length) is not None for table in tables)
    # A mean over fewer tasks would not compare with the others.
    whole = len(rows) >= asked
    text = f"{statistics.fmean(row['accuracy'] for row in rows):.2f}" if whole else f"{len(rows)} of {asked} tasks"
    if any(_is_below(table, name, length) for table in tables):
        text = f"**{text}**"
    if worst["accuracy"] < 1:
        text += f", {worst['task'].removeprefix('needle_')} {worst['accuracy']:.2f}"
    if whole and name != DENSE:
        text += f" ({statistics.fmean(row['density'] for row in rows):.2f})"
    return text


def _is_below(table: TaskTable, name: str, length: int | None) -> bool:
    row, dense = table.row(name, length), table.row(DENSE, length)
    return row is not None and dense is not None and is_below(row, dense)


def _caption(tables: Sequence[TaskTable]) -> str:
    rows = [row for table in tables for row in table.rows()]
    row = rows[0]
    names = ", ".join(table.title for table in tables)
    return (
        f"**{model_of(row)}**, mean accuracy ({row['metric']}) on {names}, {row['samples']} samples a task and length, "
        f"{drawing_of(row)}; then the worst task, and in brackets the mean density. No mean where not all tasks were "
        f"asked. Bold: more than {MARGIN} below dense on a task. {row['gpu']}, {row['dtype']}, commit "
        f"{distinct(rows, 'commit')}."
    )
