"""A training run from its checkpoint on: stages, evaluations between them, the finished model and its accuracies."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.needle.batches import Builder
from bench.needle.evaluate import accuracy_facts, measure
from bench.needle.learning import autocast, make_optimizer, mean_row, take_step
from bench.needle.network import Network, attention_kernel, export, load_release
from bench.needle.prepare import Corpus
from bench.needle.settings import Settings, Stage
from flexprefill_fa.tools.files import write_whole
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.rows import Row, append, keep, read

_SAVE_SECONDS = 60.0  # between checkpoints
_FIRST_ROW_SECONDS = 75.0  # what a stage's first steps may take, of which one compiles
_CELL_SECONDS = 25.0  # what one accuracy may take
_RESERVE = 20.0  # seconds that are kept for the last checkpoint


class OutOfTime(Exception):
    """The time that a run was given is nearly over."""


class Run:
    """One run in its folder, continued from the checkpoint there.

    Args:
        settings: what it does.
        corpus: what it reads.
        folder: for checkpoint, curve, accuracies and model.
        device: where it computes; on a GPU the layers are compiled.
        end: of its time, by `time.monotonic`.
        say: shows a line.

    Attributes:
        step: steps made. model: folder of the finished model.

    Raises:
        UsageError: for a checkpoint of another run, or a broken one.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        folder: Path,
        device: torch.device,
        end: float = math.inf,
        say: Callable[[str], object] = print,
    ):
        self._settings, self._corpus, self._device, self._end, self._say = settings, corpus, device, end, say
        self._checkpoint, self.model = folder / "checkpoint.pt", folder / "model"
        self._curve, self._accuracies = folder / "curve.jsonl", folder / "accuracy.jsonl"
        self._training, self._held_out = (
            Builder(corpus.tokenizer, text, device) for text in (corpus.train, corpus.held_out)
        )
        torch.manual_seed(settings.seed)
        self._network = Network(settings.shape).to(device)
        self._optimizer = make_optimizer(self._network, settings)
        self._identity = {"settings": repr(settings), "corpus": corpus.digest}
        self.step = self._load() if self._checkpoint.exists() else 0
        self._saved = (self.step, time.monotonic())
        # Rows of steps that the checkpoint does not have are from before a stop, and will be made again.
        for path in (self._curve, self._accuracies):
            keep(path, lambda row: row["step"] <= self.step)

    def finish(self) -> list[Row]:
        """Train, evaluate and export, all that is not done yet.

        Returns:
            The accuracies of the finished model.

        Raises:
            OutOfTime: at the end of its time; what was done is kept.
            ValueError: where the loss is no number any more; the checkpoint is from before.
            UsageError: for a GPU without the kernel that it takes.
        """
        end = 0
        try:
            with attention_kernel(self._device):
                for number, stage in enumerate(self._settings.stages):
                    end += stage.steps
                    if self.step < end:
                        self._train(number, stage, end)
                    if self.step == end:
                        with autocast(self._device), torch.compiler.set_stance("force_eager"):
                            self._evaluate(self._network, f"stage {number}", stage.length, self._settings.samples)
                export(self._network, self._corpus.folder, self.model)
                finished, _ = load_release(self.model, self._device)
                facts = accuracy_facts(self.model, self._corpus.held_out, self._settings.seed, self._device)
                for goal in self._settings.goals:
                    self._evaluate(finished, "model", goal.length, goal.samples, facts)
        except OutOfTime:
            self._save()
            raise
        return self._rows_of("model")

    def _require(self, seconds: float) -> None:
        """Go on only where something of so many seconds fits."""
        if time.monotonic() + seconds + _RESERVE > self._end:
            raise OutOfTime

    def _train(self, number: int, stage: Stage, end: int) -> None:
        if self._device.type == "cuda":
            torch.compiler.reset()  # what was compiled for another length is of no more use
            for layer in self._network.model.layers:
                layer.compile(dynamic=False)
        self._say(f"stage {number}: steps {self.step} to {end}, {stage.rows} x {stage.length} tokens each")
        every, expected = self._settings.steps_per_row, _FIRST_ROW_SECONDS
        while self.step < end:
            # Stops and checkpoints come after whole rows, so that a run in pieces has the same rows.
            self._require(expected)
            started = time.monotonic()
            steps = range(self.step, min(end, self.step - self.step % every + every))
            found = [take_step(self._network, self._optimizer, self._training, self._settings, step) for step in steps]
            means = mean_row(found)  # waits for the GPU
            expected = 1.5 * every / len(steps) * (time.monotonic() - started)
            if not math.isfinite(loss := means["loss"]):
                raise ValueError(f"the loss is {loss} at step {steps.stop}, the checkpoint is of {self._saved[0]}")
            self.step = steps.stop
            rate = self._settings.learning_rate(self.step - 1)
            row = {"step": self.step, "stage": number, "tokens": stage.length, "learning_rate": rate, **means}
            append(self._curve, row)
            if time.monotonic() - self._saved[1] > _SAVE_SECONDS:
                self._say(f"step {self.step}: loss {loss:.4f}")
                self._save()
        self._save()

    def _rows_of(self, stage: str) -> list[Row]:
        return [row for row in read(self._accuracies) if row["stage"] == stage]

    def _evaluate(self, network: Network, stage: str, length: int, samples: int, facts: Row | None = None) -> None:
        """Add the rows that are not there yet, of what fits the length."""
        there = {(row["task"], row["length"]) for row in self._rows_of(stage)}
        for task, mix in EVALUATED.items():
            if (task, length) in there or self._held_out.least_length(mix) > length:
                continue
            self._require(_CELL_SECONDS)
            found = measure(network, self._held_out, task, length, samples, self._settings.seed)
            append(self._accuracies, {"step": self.step, "stage": stage, **found, **(facts or {})})
            self._say(f"{stage}: {task} at {length} tokens: {found['exact']:.3f} exact, {found['parts']} of the parts")

    def _load(self) -> int:
        """Put the checkpoint into network and optimizer; the steps that it has."""
        problem = f"in {self._checkpoint}: remove it, or name another folder with --out"
        try:
            state = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
            if state["run"] == self._identity:
                self._network.load_state_dict(state["network"])
                self._optimizer.load_state_dict(state["optimizer"])
                return state["step"]
        except Exception as error:  # torch.load has no narrower one
            raise UsageError(f"no checkpoint that can be read ({first_line(error)}) {problem}") from error
        raise UsageError(f"a checkpoint of another run {problem}")

    def _save(self) -> None:
        """Write a checkpoint in place of the one that is there; a stop in between leaves one or the other."""
        if self._saved[0] != self.step:
            if not all(parameter.isfinite().all() for parameter in self._network.parameters()):
                raise ValueError(f"weights are not finite at step {self.step}, the checkpoint is of {self._saved[0]}")
            parts = {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}
            buffer = io.BytesIO()
            torch.save({"run": self._identity, "step": self.step, **parts}, buffer)
            write_whole(self._checkpoint, buffer.getvalue())
        self._saved = (self.step, time.monotonic())
