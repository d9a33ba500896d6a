"""What a training run does: the model's sizes, the stages from short to long text, and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench.needle.network import model_config
from flexprefill_fa.tools.needle.formats import MOST, Mix

NAMES = 512
"""Tokens `#word`, under which numbers are hidden and by which variables are called."""


@dataclass(frozen=True)
class Stage:
    """Steps on sequences of one length.

    Attributes:
        length: tokens of a sequence. rows: sequences of a step, the same number of each mix. steps: how many.
        share: of the run's schedule, which the learning rate follows; shares need not sum to 1.
        mixes: what the sequences hold; their `several` goes round from step to step.
        closing: more mixes, of sequences that end with their questions, as evaluation asks.
        text_weight: of the loss of source text, beside 1 for the answers.
    """

    length: int
    rows: int
    steps: int
    share: float
    mixes: tuple[Mix, ...]
    closing: tuple[Mix, ...] = ()
    text_weight: float = 0.5

    def mixes_at(self, step: int) -> list[tuple[Mix, bool]]:
        """The mixes of one step of this stage, and whether their questions come last."""
        mixes = [(mix, False) for mix in self.mixes] + [(mix, True) for mix in self.closing]
        return [(replace(mix, several=2 + step % (MOST - 1)), last) for mix, last in mixes]


class Goal(NamedTuple):
    """The share of `samples` questions of each task, in `length` tokens, that the finished model must answer right."""

    length: int
    samples: int
    exact: float


@dataclass(frozen=True)
class Settings:
    """A whole run: a model with the config.json `config`, its stages in their order, and what it must reach.

    Attributes:
        peak: the highest learning rate, reached after `warm_up` steps. From the share `hold` of the schedule on it
            falls, in a straight line, to `last` of the peak.
        weight_decay: of matrices. clip: the largest norm of a step's gradient.
        text_share: of the positions of source text, those that are predicted too.
        heaped: of the sequences that end with their questions, those whose statements lie in heaps.
        seed: of the first weights and of every step's sequences.
    """

    config: dict[str, Any]
    stages: tuple[Stage, ...]
    goals: tuple[Goal, ...]
    peak: float = 2e-3
    warm_up: int = 200
    hold: float = 0.35
    last: float = 0.03
    weight_decay: float = 0.1
    clip: float = 1.0
    text_share: float = 0.25
    heaped: float = 0.5
    seed: int = 0

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, step: int) -> tuple[int, int]:
        """The stage of a step of the run, and its number there."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise ValueError(f"step must be below {self.steps}, got {self.steps + step}")

    def learning_rate(self, step: int) -> float:
        """At a step of the run."""
        number, inside = self.locate(step)
        shares = [stage.share for stage in self.stages]
        progress = (sum(shares[:number]) + shares[number] * inside / self.stages[number].steps) / sum(shares)
        falling = max(0.0, (progress - self.hold) / (1 - self.hold))
        return self.peak * min(1.0, (step + 1) / self.warm_up) * (1 - falling * (1 - self.last))


def _many(needles: int, queries: int, lists: int, chains: int) -> Mix:
    """Half of the needles asked for, and two thirds of the lists and chains: the rest is there to be mistaken."""
    return Mix(needles, needles // 2, queries, lists, lists * 2 // 3, chains, chains * 2 // 3)


# As little in a long text as evaluation hides there; and chains alone, as it hides them: a model that met them only
# among other things did badly on them alone. All are asked about: each question teaches no more than its own four hops.
_FEW = Mix(needles=8, asked=4, queries=2, lists=3, lists_asked=2, chains=4, chains_asked=2)
_CHAINS = Mix(chains=4, chains_asked=4)
# Weight of source text after the first stages, which have read all of it often: more is to know it by heart.
_KNOWN_TEXT = 0.1


def _long(length: int, rows: int, steps: int, share: float, mix: Mix) -> Stage:
    """A stage of long sequences, half of them like an evaluation's."""
    return Stage(length, rows, steps, share, (mix, mix), (_FEW, _CHAINS), _KNOWN_TEXT)


_SHORT = (Mix(5, 3, 2), Mix(3, 2, 0, 2, 2), Mix(4, 2, chains=3, chains_asked=3))
_LONGER = (Mix(6, 3, 1, 2, 2, 3, 3), Mix(6, 3, 1, 2, 2, 3, 3), _many(4, 0, 0, 8))
_LISTS = (Mix(16, 8, 4, 5, 5, 8, 8), _many(16, 4, 6, 14))

FULL = Settings(
    config=model_config(),
    stages=(  # tokens of a sequence, sequences of a step, steps, share of the schedule
        Stage(512, 256, 2800, 0.16, _SHORT, (_CHAINS,)),
        Stage(1024, 128, 1200, 0.18, _LONGER, (_CHAINS,)),
        Stage(4096, 32, 1000, 0.2, _LISTS, (_FEW, _CHAINS), _KNOWN_TEXT),
        _long(16384, 16, 280, 0.16, _many(48, 10, 15, 30)),
        _long(32768, 8, 180, 0.15, _many(80, 16, 21, 45)),
        _long(65536, 4, 140, 0.15, _many(110, 24, 30, 60)),
    ),
    goals=(
        *(Goal(length, 512, 0.95) for length in (4096, 8192, 16384)),
        Goal(32768, 256, 0.95),
        Goal(65536, 128, 0.9),
    ),
)
"""The needle model's."""
