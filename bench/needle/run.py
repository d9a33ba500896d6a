"""A training run from its checkpoint on: stages, evaluations between them, the finished model and its accuracies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.needle import checkpoint
from bench.needle.batches import Builder
from bench.needle.corpus import Corpus
from bench.needle.evaluation import accuracy_facts, measure
from bench.needle.learning import Outcome, autocast, make_optimizer, mean_row, take_step
from bench.needle.network import Network
from bench.needle.pace import Clock, OutOfTime, Pace
from bench.needle.release import export, load_release
from bench.needle.settings import Settings, Stage
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle.formats import EVALUATED, MOST
from flexprefill_fa.tools.rows import Row, append, keep, read

_SAVE_SECONDS = 60.0  # between checkpoints
_SAY_SECONDS = 10.0  # between lines about losses
_FIRST_ROW_SECONDS = 75.0  # what a stage's first steps may take, of which one compiles
_CELL_SECONDS = 25.0  # what one accuracy may take
_LEARNT = 0.9  # of a stage's answers: below, a task is not learnt
FINISHED = "model"
"""The stage of the rows about the finished model."""


class Run:
    """One run in its folder, continued from the checkpoint there.

    Args:
        settings: what it does.
        corpus: what it reads.
        folder: for checkpoint, curve, accuracies and model.
        device: where it computes.
        clock: how long it may take.
        compiled: whether the layers are compiled.
        say: shows a line.

    Raises:
        UsageError: for a checkpoint of another run, a tokenizer with which a stage's sequences are too short, or too
            little text.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        folder: Path,
        device: torch.device,
        clock: Clock,
        compiled: bool,
        say: Callable[[str], None],
    ):
        self._settings, self._corpus, self._device = settings, corpus, device
        self._clock, self._compiled, self._say = clock, compiled, say
        self._checkpoint = folder / "checkpoint"
        self.curve, self.accuracies, self.model = folder / "curve.jsonl", folder / "accuracy.jsonl", folder / "model"
        self._training, self._held_out = (
            Builder(corpus.tokenizer, text, device) for text in (corpus.train, corpus.held_out)
        )
        self._check_stages()
        torch.manual_seed(settings.seed)
        self._network = Network(settings.shape).to(device)
        self._optimizer = make_optimizer(self._network, settings)
        self._identity = {"settings": settings.digest(), "corpus": corpus.digest}
        self.step = checkpoint.load(self._checkpoint, self._network, self._optimizer, self._identity)
        self._saved = (self.step, time.monotonic())
        self._said = 0.0
        # Rows of steps that the checkpoint does not have are from before a stop, and will be made again.
        for path in (self.curve, self.accuracies):
            keep(path, lambda row: row["step"] <= self.step)

    def finish(self) -> list[Row]:
        """Train, evaluate and export, all that is not done yet.

        Returns:
            The accuracies of the finished model.

        Raises:
            OutOfTime: when the clock says so; what was done is kept.
            ArithmeticError: where the loss is no number any more; the checkpoint is from before.
        """
        end = 0
        try:
            with attention_kernel(self._device):
                for number, stage in enumerate(self._settings.stages):
                    end += stage.steps
                    if self.step < end:
                        self._train(number, stage, end)
                    if self.step == end:
                        self._try(number, stage)
                export(self._network, self._corpus, self.model)
                finished = load_release(self.model, self._device)
                facts = accuracy_facts(self.model, self._corpus.held_out, self._settings.seed, self._device)
                for goal in self._settings.goals:
                    self._evaluate(finished, FINISHED, goal.length, goal.samples, facts)
        except OutOfTime:
            self._save()
            raise
        return self._rows_of(FINISHED)

    def _check_stages(self) -> None:
        """Another tokenizer may take more tokens for the same words, and another library may be short."""
        trained = max(stage.length for stage in self._settings.stages)
        evaluated = max([trained, *(goal.length for goal in self._settings.goals)])
        for what, text, longest in (
            ("training", self._corpus.train, trained),
            ("held-out", self._corpus.held_out, evaluated),
        ):
            if len(text) <= longest:
                raise UsageError(f"the corpus must have more than {longest} tokens of {what} text, got {len(text)}")
        for stage in self._settings.stages:
            mixes = [mix for step in range(MOST) for mix, _ in stage.mixes_at(step)]
            least = max(map(self._training.least_length, mixes))
            if least > stage.length:
                raise UsageError(
                    f"with this corpus what sequences of {stage.length} tokens shall hold takes {least}: "
                    "change their mixes in bench/needle/settings.py"
                )

    def _train(self, number: int, stage: Stage, end: int) -> None:
        self._clock.require(_FIRST_ROW_SECONDS)
        if self._compiled:
            torch.compiler.reset()  # what was compiled for another length is of no more use
            for layer in self._network.layers():
                layer.compile(dynamic=False)
        self._say(f"stage {number}: steps {self.step} to {end}, {stage.rows} x {stage.length} tokens each")
        pace = Pace(self._device, stage.rows * stage.length)
        every = self._settings.steps_per_row
        while self.step < end:
            # Stops and checkpoints come after whole rows, so that a run in pieces has the same rows.
            row = min(every - self.step % every, end - self.step)
            self._clock.require((row + 1) * pace.longest)
            outcomes = [self._take_step(pace) for _ in range(row)]
            self._record(number, mean_row(outcomes), pace)
            if time.monotonic() - self._saved[1] > _SAVE_SECONDS:
                self._save()
        self._save()

    def _take_step(self, pace: Pace) -> Outcome:
        outcome = take_step(self._network, self._optimizer, self._training, self._settings, self.step)
        pace.step()
        self.step += 1
        return outcome

    def _record(self, number: int, means: dict[str, float], pace: Pace) -> None:
        row = {
            "step": self.step,
            "stage": number,
            "tokens": self._settings.stages[number].length,
            "learning_rate": self._settings.learning_rate(self.step - 1),
            **means,
            "tokens_per_second": round(pace.tokens_per_second()),
        }
        if not math.isfinite(row["loss"]):
            raise ArithmeticError(
                f"the loss is {row['loss']} at step {self.step}; the checkpoint is of step {self._saved[0]}"
            )
        append(self.curve, row)
        if time.monotonic() - self._said > _SAY_SECONDS:
            shown = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
            self._say("  ".join(shown))
            self._said = time.monotonic()

    def _try(self, number: int, stage: Stage) -> None:
        """Evaluate after a stage, and warn of a task that is not learnt where it should be."""
        name = f"stage {number}"
        with autocast(self._device), torch.compiler.set_stance("force_eager"):
            self._evaluate(self._network, name, stage.length, self._settings.samples)
        for row in self._rows_of(name):
            if row["exact"] < _LEARNT:
                self._say(
                    f"warning: {name} leaves {row['task']} at {row['exact']:.3f}: the later stages are too short to "
                    "learn a task; if it does not rise soon, begin again with another --seed"
                )

    def _rows_of(self, stage: str) -> list[Row]:
        return [row for row in read(self.accuracies) if row["stage"] == stage]

    def _evaluate(self, network: Network, stage: str, length: int, samples: int, facts: Row | None = None) -> None:
        """Add the rows that are not there yet."""
        there = {(row["task"], row["length"]) for row in self._rows_of(stage)}
        for task, mix in EVALUATED.items():
            if (task, length) in there or self._held_out.least_length(mix) > length:
                continue
            self._clock.require(_CELL_SECONDS)
            found = measure(network, self._held_out, task, length, samples, self._settings.seed)
            append(self.accuracies, {"step": self.step, "stage": stage, **found.row(task, length), **(facts or {})})
            self._say(f"{stage}: {task} at {length} tokens: {found.exact:.3f} exact, {found.parts:.4f} of the parts")

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint."""
        return self._saved[0]

    def _save(self) -> None:
        if self._saved[0] != self.step:
            if not all(parameter.isfinite().all() for parameter in self._network.parameters()):
                raise ArithmeticError(
                    f"weights are not finite at step {self.step}; the checkpoint is of step {self.saved_step}"
                )
            checkpoint.save(self._checkpoint, self._network, self._optimizer, {**self._identity, "step": self.step})
        self._saved = (self.step, time.monotonic())


def require_flash(device: torch.device) -> None:
    """Check that a GPU has the kernel that `attention_kernel` asks for, in bfloat16.

    Raises:
        UsageError: for one that is too old.
    """
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return
    name, found = torch.cuda.get_device_name(device), ".".join(map(str, capability))
    raise UsageError(
        f"flash attention in bfloat16 needs a GPU of compute capability 8.0 or more, and {device} ({name}) has {found}"
    )


@contextmanager
def attention_kernel(device: torch.device) -> Iterator[None]:
    """On a GPU flash attention or nothing: the kernels that SDPA would fall back to need memory for all scores."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
