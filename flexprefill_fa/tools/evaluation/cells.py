"""Cells of the accuracy table: one task, length and selector each, with everything a row says about its conditions."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flexprefill_fa.choice import Choice
from flexprefill_fa.integrations.lm_eval import FlexPrefillLM
from flexprefill_fa.tools.evaluation import ACCURACY_KIND
from flexprefill_fa.tools.evaluation.harness import Answers, Tasks, ask, has_budget
from flexprefill_fa.tools.generation import Measurement, measure_dense, measure_sparse
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.rows import Row, model_conditions, package_version

_OUTCOMES = (
    *("metric", "accuracy", "wrong", "samples", "truncated", "prompts_sha256", "density", "recall", "recall_min"),
    *("timing", "model"),
)
"""The fields of a row that are found out, and the model's name; all others say whether a cell is done already."""

_REPEATS = 5  # of each timed prefill


@dataclass(frozen=True)
class EvaluationPlan:
    """What to ask, how often and of whom.

    Attributes:
        lengths: budgets in tokens for the tasks that make their prompts; others have their own.
        samples: questions per cell at most.
        choices: selectors.
        seed: of the questions.
        chat_template: whether prompts go into the tokenizer's chat template.
        measured_prompts: prompts of each cell whose recall and prefill time are measured.
    """

    lengths: tuple[int, ...]
    samples: int
    choices: tuple[Choice, ...]
    seed: int
    chat_template: bool
    measured_prompts: int


@dataclass(frozen=True)
class Cell:
    """A task with its data at one length, the selector, and the row as far as it is known before."""

    task: Any
    length: int | None
    choice: Choice
    known: Row


class Evaluation:
    """Runs the cells of a plan.

    Args:
        lm: the model.
        tasks: the tasks to ask.
        plan: how.
        model: what to call the model in rows.
        folder: where the model is.

    Raises:
        UsageError: where sparse prefill refuses the model or a choice.
    """

    def __init__(self, lm: FlexPrefillLM, tasks: Tasks, plan: EvaluationPlan, model: str, folder: str | Path):
        self._lm, self._tasks, self._plan = lm, tasks, plan
        self._folder, self._name = Path(folder).resolve(), model
        for choice in (*plan.choices, Choice(None)):
            self._use(choice)  # what the model refuses is told before anything is asked
        self._versions = {name: tasks.version(name) for name in tasks.names}
        self._asked: dict[tuple[str, int | None], str] = {}  # task and length -> the hash of the prompts
        self._conditions: Row = {
            "kind": ACCURACY_KIND,
            **model_conditions(lm.model, folder),
            "lm_eval": version("lm_eval"),
            # Prompts are made of its words, and of the text of Python's standard library.
            "wonderwords": package_version("wonderwords"),
            "seed": plan.seed,
            "batch_size": lm.batch_size,
            "chat_template": plan.chat_template,
            "measured_prompts": plan.measured_prompts,
        }

    def cells(self, done: Iterable[Row], failed: Callable[[str], None]) -> Iterator[Cell]:
        """The cells that `done` has no row for; each task's data is made or read just before its first cell.

        Args:
            done: rows of earlier runs; those of other kinds and tasks do not count.
            failed: called with a line about a task that cannot be asked (at one length, or at all); others go on.
        """
        finished = []
        for row in done:
            if row["kind"] != ACCURACY_KIND or row["task"] not in self._versions:
                continue
            finished.append(self._identity(row))
            if finished[-1] in [self._known(row["task"], row["length"], choice) for choice in self._plan.choices]:
                self._asked[row["task"], row["length"]] = row["prompts_sha256"]
        for name in self._tasks.names:
            for length in self._plan.lengths:
                known = [self._known(name, length, choice) for choice in self._plan.choices]
                alone = [self._known(name, None, choice) for choice in self._plan.choices]
                if all(row in finished for row in known) or all(row in finished for row in alone):
                    continue
                try:
                    task = self._tasks.load(name, self._metadata(length), self._plan.seed)
                    budget = has_budget(task)
                    if budget and length > self._lm.max_length:
                        raise UsageError(
                            f"task {name}: length must be at most {self._lm.max_length}, the model's position range, "
                            f"got {length}"
                        )
                except UsageError as error:
                    failed(str(error))
                    continue
                for choice, row in zip(self._plan.choices, known if budget else alone, strict=True):
                    if row not in finished:
                        yield Cell(task, length if budget else None, choice, row)
                if not budget:
                    break

    @staticmethod
    def _identity(row: Row) -> Row:
        # Rows from before layers could stay dense do not have the field.
        return {key: value for key, value in {"dense_layers": [], **row}.items() if key not in _OUTCOMES}

    def _metadata(self, length: int) -> dict[str, Any]:
        plan = self._plan
        settings = {"samples": plan.samples, "seed": plan.seed, "chat_template": plan.chat_template}
        return {"tokenizer": str(self._folder), "max_seq_lengths": [length], **settings}

    def _known(self, task: str, length: int | None, choice: Choice) -> Row:
        return {
            **self._conditions,
            "task": task,
            "task_version": self._versions[task],
            "length": length,
            "limit": self._plan.samples,
            "selector": choice.name,
            "settings": {} if choice.config is None else dataclasses.asdict(choice.config),
            "mean_correction": choice.mean_correction,
            "dense_layers": list(choice.dense_layers),
        }

    def _use(self, choice: Choice) -> None:
        try:
            self._lm.use(choice)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error

    def run(self, cell: Cell) -> Row:
        """Ask the questions of a cell, then measure prefill time and recall on its first prompts.

        Raises:
            UsageError: where sparse prefill refuses the model, or earlier rows of the task were asked other questions.
        """
        start = time.perf_counter()
        self._use(cell.choice)
        try:
            answers = ask(
                self._lm,
                self._tasks,
                cell.task,
                cell.length,
                self._plan.samples,
                self._plan.seed,
                self._plan.chat_template,
            )
            density, made_dense = self._lm.density(), self._lm.made_dense
        finally:
            self._lm.use(Choice(None))
        asked = self._asked.setdefault((cell.known["task"], cell.length), answers.prompts_sha256)
        if asked != answers.prompts_sha256:
            raise UsageError(
                f"task {cell.known['task']} has other prompts than its earlier rows, whose prompts_sha256 begins with "
                f"{asked[:10]}: expected the same, got {answers.prompts_sha256[:10]}; use another --out"
            )
        measured = self._measure(cell.choice, answers)
        recalls = [layer.recall for one in measured for layer in one.layers if layer.recall is not None]
        recalls += [1.0] * (made_dense * sum(bool(one.layers) for one in measured))
        lowest = [layer.lowest_recall for one in measured for layer in one.layers if layer.lowest_recall is not None]
        timing = {
            "prefill_ms": round(1e3 * statistics.median(one.prefill_seconds for one in measured), 3)
            if measured
            else None,
            "seconds": round(time.perf_counter() - start, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        return (
            {"model": self._name}
            | cell.known
            | {
                "metric": answers.metric,
                "accuracy": round(answers.value, 5),
                "samples": answers.samples,
                "wrong": answers.wrong,
                "truncated": answers.truncated,
                "prompts_sha256": answers.prompts_sha256,
                "density": round(density, 5),
                # A prompt that ran dense keeps everything.
                "recall": (round(statistics.fmean(recalls), 5) if recalls else 1.0) if measured else None,
                "recall_min": (round(min(lowest), 5) if lowest else 1.0) if measured else None,
                "timing": timing,
            }
        )

    def _measure(self, choice: Choice, answers: Answers) -> list[Measurement]:
        """Prefill time and recall of the first prompts; none where memory does not suffice for exact attention."""
        quiet = WorkProgress(Console(quiet=True, force_terminal=False))
        model: Any = self._lm.model
        found = []
        for prompt in answers.first_prompts[: self._plan.measured_prompts]:
            ids = torch.tensor([prompt], device=self._lm.device)
            try:
                if choice.config is None:
                    found.append(measure_dense(model, ids, 1, quiet, repeats=_REPEATS))
                else:
                    options = {**choice.options, "repeats": _REPEATS, "recall": True}
                    found.append(measure_sparse(model, ids, choice.config, 1, quiet, **options))
            except torch.OutOfMemoryError:
                return []
        return found


def count_cells(plan: EvaluationPlan, tasks: Tasks) -> int:
    """The most cells that a plan has."""
    return len(tasks.names) * len(plan.lengths) * len(plan.choices)
