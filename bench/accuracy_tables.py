"""Tables of `flexprefill eval`: accuracy and density by task and length, and all tasks of a model in one."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial

from bench.tables import Line, Table, group_rows, method, pivot, usual_knob, values
from flexprefill_fa.choice import DENSE
from flexprefill_fa.tools.evaluation import ACCURACY_KIND
from flexprefill_fa.tools.rows import Row

MARGIN = 0.02
"""How far below dense attention an accuracy may lie before it is marked."""
_SAME = "model model_sha256 tokenizer_sha256 metric samples chat_template seed python dtype"
_ONE = "task task_version length selector settings mean_correction dense_layers"
_BOLD = f"Bold: more than {MARGIN} below dense on a task"


def answers(rows: list[Row]) -> list[Row]:
    """Task by task, dense first, with what dense attention answered.

    Raises:
        ValueError: where those of one task and length are of several prompts.
    """
    for same in group_rows(rows, "task task_version length"):
        if len(prompts := dict.fromkeys(row["prompts_sha256"][:10] for row in same)) > 1:
            raise ValueError(
                f"accuracy rows of {same[0]['task']} at {same[0]['length']} tokens must be of the same prompts to "
                f"stand beside each other, got prompts_sha256 {', '.join(prompts)}"
            )
    tasks = list(dict.fromkeys(map(title_of, rows)))
    dense = {(title_of(row), row["length"]): row["accuracy"] for row in rows if row["selector"] == DENSE}
    ordered = sorted(rows, key=lambda row: (tasks.index(title_of(row)), row["selector"] != DENSE))
    return [row | {"dense": dense.get((title_of(row), row["length"]))} for row in ordered]


def tokens(length: int | None) -> str:
    """The title of a length."""
    return "the task's own prompts" if length is None else f"{length:,}"


def title_of(row: Row) -> str:
    """The task, with its version if it has one."""
    return row["task"] if row["task_version"] is None else f"{row['task']} version {row['task_version']}"


def _is_below(row: Row) -> bool:
    return row["dense"] is not None and row["accuracy"] < row["dense"] - MARGIN - 1e-9


def _task_lines(rows: list[Row]) -> list[Line]:
    """A line for each task and selector, a column for each length; recall where it was measured, at the longest."""
    found = answers(rows)
    longest = max((row["length"] for row in found if row["measured_prompts"] and row["length"]), default=None)

    def cells(row: Row) -> Line:
        plain = row["selector"] == DENSE
        text = f"**{row['accuracy']:.2f}**" if _is_below(row) else f"{row['accuracy']:.2f}"
        line = {tokens(row["length"]): text if plain else f"{text} ({row['density']:.2f})"}
        if row["length"] == longest and row["recall"] is not None and not plain:
            line[f"recall at {longest:,}"] = f"{row['recall']:.3f} ({row['recall_min']:.2f})"
        return line

    entries = (({"task": title_of(row), "selector": method(row)}, cells(row)) for row in found)
    return pivot(entries, map(tokens, values(found, "length")))


TASKS = Table(
    group_by=_SAME,
    identity=_ONE,
    caption="**{model}**: accuracy, in brackets the density; recall as the mean over heads, in brackets of the worst. "
    f"{_BOLD}",
    lines=_task_lines,
    where=lambda row: row["kind"] == ACCURACY_KIND,
)


def _summary_lines(rows: list[Row], name: Callable[[Row], str] = method) -> list[Line]:
    """A line for each selector: the mean over tasks, where all were asked, the worst one, and the mean density."""
    newest = {row["task"]: row["task_version"] for row in rows}
    found = answers([row for row in rows if row["task_version"] == newest[row["task"]]])
    asked = {length: 0 for length in values(found, "length")}  # tasks
    parts: dict[tuple[str, int | None], dict[str, Row]] = {}
    for row in found:
        parts.setdefault((name(row), row["length"]), {})[title_of(row)] = row
    for (who, length), tasks in parts.items():
        asked[length] = len(tasks) if who == DENSE else asked[length]
    entries = []
    for (who, length), tasks in parts.items():
        worst = min(tasks.values(), key=lambda row: row["accuracy"])
        whole = len(tasks) >= asked[length]
        mean = statistics.fmean(row["accuracy"] for row in tasks.values())
        text = f"{mean:.2f}" if whole else f"{len(tasks)} of {asked[length]} tasks"
        text = f"**{text}**" if any(map(_is_below, tasks.values())) else text
        short = worst["task"].removeprefix("needle_").removeprefix("offline_")
        text += f", {short} {worst['accuracy']:.2f}" if worst["accuracy"] < 1 else ""
        if whole and who != DENSE:
            text += f" ({statistics.fmean(row['density'] for row in tasks.values()):.2f})"
        entries.append(({"selector": who}, {tokens(length): text}))
    return pivot(entries, map(tokens, asked))


SUMMARY = dataclasses.replace(
    TASKS,
    lines=_summary_lines,
    caption="**{model}**: mean accuracy over the tasks below, the worst task, in brackets the mean density; no mean "
    f"where not all tasks were asked. {_BOLD}",
)
USUAL = dataclasses.replace(
    SUMMARY,
    where=lambda row: TASKS.where(row) and usual_knob(row) and not row["dense_layers"],
    lines=partial(_summary_lines, name=lambda row: method({**row, "settings": {}})),
)
