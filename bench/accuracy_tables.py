"""Tables of `flexprefill eval`: accuracy and density by task and length, and all tasks of a model in one."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from functools import partial

from bench.tables import Column, Table, bold, distinct, has_usual_knob, method, model_of, pivot, values, versions
from flexprefill_fa.choice import DENSE
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.evaluation import ACCURACY_KIND
from flexprefill_fa.tools.rows import Row

MARGIN = 0.02
"""How far below dense attention an accuracy may lie before it is marked."""
ANSWERS = "ruler"
"""The file of rows of `flexprefill eval` on real models."""

_TASK = ("task", "task_version")
_CONDITIONS = ("model", "model_sha256", "tokenizer_sha256", "python", "gpu", "dtype", "seed", "samples")
_CONDITIONS += ("chat_template", "metric")
_CELL = ("length", "selector", "settings", "mean_correction", "dense_layers")

Cells = dict[tuple[str, "int | None"], Row]
"""Rows of one task by the name of their line and the length."""


def cells_of(rows: Iterable[Row]) -> Cells:
    """The rows of one task, dense first."""
    cells: Cells = {}
    for row in sorted(rows, key=lambda row: row["selector"] != DENSE):
        cells[method(row), row["length"]] = row
    for found in pivot(cells.values(), lambda row: row["length"], lambda row: row["prompts_sha256"]).values():
        if len(found) > 1:
            row = next(iter(found.values()))
            raise ValueError(
                f"accuracy rows of {row['task']} at {row['length']} tokens must be of the same prompts to stand beside "
                f"each other, got prompts_sha256 {', '.join(sorted(name[:10] for name in found))}"
            )
    return cells


def _names(cells: Iterable[Cells]) -> Iterable[str]:
    """A line for each selector and settings."""
    return dict.fromkeys(name for found in cells for name, _ in found)


def _tokens(length: int | None) -> str:
    return "the task's own prompts" if length is None else f"{length:,}"


def title_of(row: Row) -> str:
    """The task, with its version if it has one."""
    version = row["task_version"]
    return row["task"] if version is None else f"{row['task']} version {version}"


def _is_below(row: Row | None, dense: Row | None) -> bool:
    return row is not None and dense is not None and row["accuracy"] < dense["accuracy"] - MARGIN - 1e-9


def _accuracy(row: Row, dense: Row | None) -> str:
    value = bold(f"{row['accuracy']:.2f}", _is_below(row, dense))
    return value if row["selector"] == DENSE else f"{value} ({row['density']:.2f})"


def _recall(row: Row, _: Row | None) -> str:
    if row["recall"] is None:
        return "-"
    return "1" if row["selector"] == DENSE else f"{row['recall']:.3f} ({row['recall_min']:.2f})"


def _time(row: Row, dense: Row | None) -> str:
    time, before = (found["timing"]["prefill_ms"] if found else None for found in (row, dense))
    if time is None:
        return "-"
    return f"{time:.1f} ({before / time:.1f}x)" if before else f"{time:.1f}"


def _task_columns(rows: list[Row]) -> list[Column]:
    cells, lengths = cells_of(rows), values(rows, "length")
    measured = [length for length in lengths if any(row["measured_prompts"] for row in rows if row["length"] == length)]

    def column(title: str, cell, length: int | None) -> Column:
        dense = cells.get((DENSE, length))
        return title, lambda name: cell(cells[name, length], dense) if (name, length) in cells else "-"

    columns = [column(_tokens(length), _accuracy, length) for length in lengths]
    if measured:
        columns.append(column(f"recall at {_tokens(measured[-1])}", _recall, measured[-1]))
        both = dict.fromkeys((measured[0], measured[-1]))
        columns += [column(f"prefill at {_tokens(length)}", _time, length) for length in both]
    return [("selector", str), *columns]


def _drawing(row: Row) -> str:
    """How the prompts were made."""
    return f"seed {row['seed']}, Python {row['python']}{', chat template' if row['chat_template'] else ''}"


def _task_caption(rows: Sequence[Row]) -> str:
    rows = list(cells_of(rows).values())
    row = rows[0]
    measured = " and ".join(sorted({str(row["measured_prompts"]) for row in rows if row["measured_prompts"]}))
    timed = (
        f" Recall as the mean over heads (the worst head); prefill time of an uncompiled model on {measured} prompts "
        "one by one, in ms and against dense, selection included; small models are held up by launches."
    )
    return (
        f"**{title_of(row)}** ({row['metric']}), {row['samples']} samples a cell, {_drawing(row)}, "
        f"model {model_of(row)}. Accuracy, in brackets the density; bold: more than {MARGIN} below dense. "
        f"{distinct(rows, 'gpu')}, {row['dtype']}, {versions(rows)}, transformers {distinct(rows, 'transformers')}, "
        f"lm-eval {distinct(rows, 'lm_eval')}, commit {distinct(rows, 'commit')}, "
        f"{distinct([row['timing'] for row in rows], 'date')}.{timed if measured else ''}"
    )


TASKS = Table(
    group_by=(*_CONDITIONS, *_TASK),
    identity=_CELL,
    where=lambda row: row["kind"] == ACCURACY_KIND,
    lines=lambda rows: _names([cells_of(rows)]),
    columns=_task_columns,
    caption=_task_caption,
)
"""One task: accuracy and density at each length, and recall and prefill time where prompts were measured.

Recall is that of the longest such length, times are of the shortest and the longest.
"""


# All tasks that were asked under the same conditions in one table; of each task, the version whose rows begin last.


def _tasks(rows: Iterable[Row]) -> list[Cells]:
    """The cells of each task."""
    parts: dict[str, dict[float | None, list[Row]]] = {}
    for row in rows:
        parts.setdefault(row["task"], {}).setdefault(row["task_version"], []).append(row)
    return [cells_of(list(versions.values())[-1]) for versions in parts.values()]


def _summary_cell(name: str, tasks: Sequence[Cells], length: int | None) -> str:
    rows = [cells[name, length] for cells in tasks if (name, length) in cells]
    if not rows:
        return "-"
    worst = min(rows, key=lambda row: row["accuracy"])
    asked = sum((DENSE, length) in cells for cells in tasks)
    # A mean over fewer tasks would not compare with the others.
    whole = len(rows) >= asked
    text = f"{statistics.fmean(row['accuracy'] for row in rows):.2f}" if whole else f"{len(rows)} of {asked} tasks"
    text = bold(text, any(_is_below(cells.get((name, length)), cells.get((DENSE, length))) for cells in tasks))
    if worst["accuracy"] < 1:
        text += f", {worst['task'].removeprefix('needle_')} {worst['accuracy']:.2f}"
    if whole and name != DENSE:
        text += f" ({statistics.fmean(row['density'] for row in rows):.2f})"
    return text


def _summary_columns(rows: list[Row]) -> list[Column]:
    tasks = _tasks(rows)
    lengths = values([row for cells in tasks for row in cells.values()], "length")
    return [
        ("selector", str),
        *((_tokens(length), partial(_summary_cell, tasks=tasks, length=length)) for length in lengths),
    ]


def _summary_caption(rows: Sequence[Row]) -> str:
    tasks = _tasks(rows)
    found = [row for cells in tasks for row in cells.values()]
    row = found[0]
    names = ", ".join(title_of(next(iter(cells.values()))) for cells in tasks)
    return (
        f"**{model_of(row)}**, mean accuracy ({row['metric']}) on {names}, {row['samples']} samples a task and length, "
        f"{_drawing(row)}; then the worst task, and in brackets the mean density. No mean where not all tasks were "
        f"asked. Bold: more than {MARGIN} below dense on a task. {row['gpu']}, {row['dtype']}, commit "
        f"{distinct(found, 'commit')}."
    )


SUMMARY = Table(
    group_by=_CONDITIONS,
    identity=(*_TASK, *_CELL),
    where=TASKS.where,
    lines=lambda rows: _names(_tasks(rows)),
    columns=_summary_columns,
    caption=_summary_caption,
)
"""How well each selector does on average, and where it does worst, by model and conditions."""


REAL_TASKS = dataclasses.replace(TASKS, group_by=tuple(name for name in TASKS.group_by if name != "gpu"))
"""Of real models, whose prefills nobody timed: on whatever GPU they were asked."""


class RealAnswers:
    """Mean accuracy of one real model over tasks; `asked` are the tasks at each length in tokens."""

    def __init__(self, rows: Iterable[Row], model_sha256: str) -> None:
        found = (row for group in REAL_TASKS.groups(rows) for row in group)
        self._rows = [row for row in found if row["model_sha256"] == model_sha256 and not row["dense_layers"]]
        self.asked: dict[int, set[str]] = {length: set() for length in values(self._rows, "length") if length}
        for row in self._rows:
            if row["selector"] == DENSE and row["length"]:
                self.asked[row["length"]].add(row["task"])

    def text(self, selector: str = DENSE, correction: MeanCorrection = False) -> str:
        """Mean accuracy at each length, of the selector's usual knob; a dash where not all its tasks were asked."""
        who = {"selector": selector, "mean_correction": correction}
        usual = [row for row in self._rows if row | who == row and has_usual_knob(row)]
        means = []
        for length, asked in self.asked.items():
            found = {row["task"]: row["accuracy"] for row in usual if row["length"] == length}
            means.append(f"{statistics.fmean(found.values()):.2f}" if found and asked <= set(found) else "-")
        return "-" if set(means) <= {"-"} else " / ".join(means)
