"""Accuracy rows of `flexprefill eval` as tables for the documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.tables import VERSIONS, distinct, markdown_table
from flexprefill_fa.choice import DENSE
from flexprefill_fa.tools.evaluation import ACCURACY_KIND
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row, latest

MARGIN = 0.02
"""How far below dense attention an accuracy may lie before it is marked."""

_CONDITIONS = (
    "model",
    "model_sha256",
    "tokenizer_sha256",
    "python",
    "gpu",
    "dtype",
    "seed",
    "samples",
    "chat_template",
    "task",
    "task_version",
    "metric",
)
"""What the rows of a table have in common."""

_OF_THE_TASK = ("task", "task_version")


@dataclass(frozen=True)
class Line:
    """A selector and its settings: `name` for a table, and its rows by length in tokens (None: the task's own)."""

    name: str
    by_length: dict[int | None, Row]


@dataclass(frozen=True)
class TaskTable:
    """Rows of one task under the same conditions; dense first."""

    task: str
    lengths: tuple[int | None, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """The task, with its version if it has one."""
        version = self.rows()[0]["task_version"]
        return self.task if version is None else f"{self.task} version {version}"

    @property
    def conditions(self) -> str:
        """What its rows have in common but the task: tables of other tasks with the same may be summed up together."""
        return _key(self.rows()[0], [name for name in _CONDITIONS if name not in _OF_THE_TASK])

    def row(self, name: str, length: int | None) -> Row | None:
        """The row of a line at a length, if it was measured."""
        return next((line.by_length.get(length) for line in self.lines if line.name == name), None)

    def rows(self) -> list[Row]:
        """Every row."""
        return [row for line in self.lines for row in line.by_length.values()]


def task_tables(rows: Iterable[Row]) -> list[TaskTable]:
    """The accuracy rows among `rows`, the latest of each cell, one table per task and conditions."""
    found: dict[str, list[Row]] = {}
    for row in latest((row for row in rows if row["kind"] == ACCURACY_KIND), _cell):
        found.setdefault(_key(row, _CONDITIONS), []).append(row)
    return [_table_of(group) for group in found.values()]


def _cell(row: Row) -> str:
    return _key(row, (*_CONDITIONS, "length", "selector", "settings", "mean_correction", "dense_layers"))


def _key(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row[name] for name in names], sort_keys=True)


def _table_of(rows: Sequence[Row]) -> TaskTable:
    for length in {row["length"] for row in rows}:
        prompts = {row["prompts_sha256"] for row in rows if row["length"] == length}
        if len(prompts) > 1:
            raise ValueError(
                f"accuracy rows of {rows[0]['task']} at {length} tokens must be of the same prompts to stand beside "
                f"each other, got prompts_sha256 {', '.join(sorted(found[:10] for found in prompts))}"
            )
    lines: dict[str, dict[int | None, Row]] = {}
    for row in sorted(rows, key=lambda row: row["selector"] != DENSE):
        lines.setdefault(_name(row), {})[row["length"]] = row
    lengths = sorted({row["length"] for row in rows}, key=lambda length: length or 0)
    named = tuple(Line(name, by_length) for name, by_length in lines.items())
    return TaskTable(rows[0]["task"], tuple(lengths), named)


def _name(row: Row) -> str:
    """The selector and the settings that are not its usual ones."""
    told = [f"{name} {value}" for name, value in changed_settings(row["selector"], row["settings"]).items()]
    told += ["mean correction"] if row["mean_correction"] else []
    dense = ", ".join(map(str, row["dense_layers"]))
    told += [f"layer{'s' if len(row['dense_layers']) > 1 else ''} {dense} dense"] if dense else []
    return ", ".join([row["selector"], *told])


def accuracy_tables(rows: Iterable[Row]) -> str:
    """One table per task: accuracy and density at each length, and recall and prefill time where prompts were measured.

    Recall is that of the longest such length, times are of the shortest and the longest.
    """
    return "\n\n".join(_markdown(table) for table in task_tables(rows))


def _markdown(table: TaskTable) -> str:
    header = ["selector", *(tokens_of(length) for length in table.lengths)]
    timed = {row["length"] for row in table.rows() if row["measured_prompts"]}
    measured = [length for length in table.lengths if length in timed]
    ends = list(dict.fromkeys((measured[0], measured[-1]))) if measured else []
    if measured:
        header += [f"recall at {tokens_of(ends[-1])}", *(f"prefill at {tokens_of(length)}" for length in ends)]
    body = []
    for line in table.lines:
        cells = [_accuracy(line.by_length.get(length), table.row(DENSE, length)) for length in table.lengths]
        if measured:
            cells.append(_recall(line.by_length.get(ends[-1])))
            cells += [_time(line.by_length.get(length), table.row(DENSE, length)) for length in ends]
        body.append([line.name, *cells])
    return f"{_caption(table)}\n\n{markdown_table(header, body)}"


def tokens_of(length: int | None) -> str:
    """A length as a heading."""
    return "the task's own prompts" if length is None else f"{length:,}"


def _accuracy(row: Row | None, dense: Row | None) -> str:
    if row is None:
        return "-"
    value = f"{row['accuracy']:.2f}"
    if dense is not None and is_below(row, dense):
        value = f"**{value}**"
    return value if row["selector"] == DENSE else f"{value} ({row['density']:.2f})"


def is_below(row: Row, dense: Row) -> bool:
    """Whether an accuracy is more than `MARGIN` below that of dense attention."""
    return row["accuracy"] < dense["accuracy"] - MARGIN - 1e-9


def _recall(row: Row | None) -> str:
    if row is None or row["recall"] is None:
        return "-"
    return "1" if row["selector"] == DENSE else f"{row['recall']:.3f} ({row['recall_min']:.2f})"


def _time(row: Row | None, dense: Row | None) -> str:
    time = row["timing"]["prefill_ms"] if row else None
    before = dense["timing"]["prefill_ms"] if dense else None
    if time is None:
        return "-"
    return f"{time:.1f} ({before / time:.1f}x)" if before else f"{time:.1f}"


def drawing_of(row: Row) -> str:
    """How the prompts were made."""
    return f"seed {row['seed']}, Python {row['python']}{', chat template' if row['chat_template'] else ''}"


def model_of(row: Row) -> str:
    """A model's name and the beginning of its hash."""
    return f"{row['model']} (SHA-256 {row['model_sha256'][:10]})"


def _caption(table: TaskTable) -> str:
    rows = table.rows()
    row = rows[0]
    versions = ", ".join(f"{title} {distinct(rows, name)}" for name, title in VERSIONS if distinct(rows, name))
    measured = " and ".join(sorted({str(row["measured_prompts"]) for row in rows if row["measured_prompts"]}))
    timed = (
        f" Recall as the mean over heads (the worst head); prefill time of an uncompiled model on {measured} prompts "
        "one by one, in ms and against dense, selection included; small models are held up by launches."
    )
    dates = ", ".join(dict.fromkeys(row["timing"]["date"] for row in rows))
    return (
        f"**{table.title}** ({row['metric']}), {row['samples']} samples a cell, {drawing_of(row)}, "
        f"model {model_of(row)}. "
        f"Accuracy, in brackets the density; bold: more than {MARGIN} below dense. "
        f"{row['gpu']}, {row['dtype']}, {versions}, "
        f"transformers {distinct(rows, 'transformers')}, lm-eval {distinct(rows, 'lm_eval')}, commit "
        f"{distinct(rows, 'commit')}, {dates}.{timed if measured else ''}"
    )


def sparse_rows(table: TaskTable) -> list[Row]:
    """The rows of a table that a plot shows as points."""
    return [row for row in table.rows() if row["selector"] != DENSE]
