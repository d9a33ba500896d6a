"""Prompts of an exact length in tokens, for any tokenizer: more haystack while it fits, then a few filler words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class BudgetError(ValueError):
    """A length is too short for a task."""


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: up to the question.
        outputs: the strings that the answer must hold.
        prefix: how the answer begins; given to the model behind the prompt, or as the start of its turn in a chat.
    """

    prompt: str
    outputs: tuple[str, ...]
    prefix: str = ""

    @property
    def text(self) -> str:
        """What a model without a chat template reads."""
        return f"{self.prompt} {self.prefix}" if self.prefix else self.prompt


CountTokens = Callable[[list[Sample]], list[int]]
"""Tokens of what the model reads of each sample."""

_FILLERS = (" .", " a", "\n", ".", " x1")
"""What fills the last tokens. One of them is a token of its own in nearly every vocabulary."""

_ROUNDS = 30


class Recipe(Protocol):
    """How to draw a sample of a task."""

    @property
    def new_tokens(self) -> int:
        """Tokens that the answer may take; they belong to the budget."""
        ...

    @property
    def least_units(self) -> int:
        """The least haystack that the task can be drawn with."""
        ...

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """A sample with `units` of haystack and `filler` where it disturbs nobody.

        Args:
            units: how much haystack: sentences, lines or words; more units make a longer prompt.
            filler: short text to put into the haystack.
            rng: fresh for each call; what is asked must not depend on `units`.
            length: the budget in tokens, for tasks whose published parameters depend on it.
        """
        ...


def fit(recipe: Recipe, count: CountTokens, length: int, samples: int, seed: int) -> list[tuple[Sample, int]]:
    """Samples whose prompt and answer take `length` tokens together, each with its prompt's tokens.

    The prompt has exactly `length - recipe.new_tokens` tokens wherever the tokenizer lets a filler word be one token;
    elsewhere it is a few tokens short, never longer.

    Args:
        recipe: the task.
        count: tokens of samples; called with many at a time, because tokenizers work on them in parallel.
        length: the budget in tokens.
        samples: how many.
        seed: sample i is a function of it and i.

    Raises:
        BudgetError: where not even the least haystack fits.
    """
    target = length - recipe.new_tokens

    def draw(index: int, units: int, filler: str) -> Sample:
        return recipe.draw(units, filler, random.Random(f"{seed}-{index}"), length)

    units = _haystacks(recipe, lambda pairs: count([draw(i, n, "") for i, n in pairs]), target, samples, length)
    fillers = _fillers(lambda pairs: count([draw(i, units[i], filler) for i, filler in pairs]), target, len(units))
    return [(draw(index, units[index], filler), tokens) for index, (filler, tokens) in enumerate(fillers)]


def _haystacks(
    recipe: Recipe, measure: Callable[[Sequence[tuple[int, int]]], list[int]], target: int, samples: int, length: int
) -> list[int]:
    """For each sample, the most units that fit, or nearly the most: what is left then is for the filler."""
    least = recipe.least_units
    low = [(least, tokens) for tokens in measure([(index, least) for index in range(samples)])]
    over = max(tokens for _, tokens in low)
    if over > target:
        raise BudgetError(
            f"length must be at least {over + recipe.new_tokens} tokens for this task's shortest prompt and its "
            f"answer, got {length}"
        )
    # A first step, to learn what a unit costs.
    step = max(8, least)
    second = measure([(index, least + step) for index in range(samples)])
    slope = [max((tokens - low[index][1]) / step, 1e-3) for index, tokens in enumerate(second)]
    high: list[int | None] = [None] * samples
    for index, tokens in enumerate(second):
        if tokens <= target:
            low[index] = (least + step, tokens)
        else:
            high[index] = least + step
    for _ in range(_ROUNDS):
        guesses = []
        for index, (units, tokens) in enumerate(low):
            if target - tokens < 2 * slope[index] or high[index] == units + 1:
                continue
            guess = max(units + 1, units + int((target - tokens) / slope[index]))
            ceiling = high[index]
            guesses.append((index, guess if ceiling is None or guess < ceiling else (units + ceiling) // 2))
        if not guesses:
            break
        for (index, guess), tokens in zip(guesses, measure(guesses), strict=True):
            units, before = low[index]
            slope[index] = max((tokens - before) / (guess - units), 1e-3)
            if tokens <= target:
                low[index] = (guess, tokens)
            else:
                high[index] = guess
    return [units for units, _ in low]


def _fillers(
    measure: Callable[[Sequence[tuple[int, str]]], list[int]], target: int, samples: int
) -> list[tuple[str, int]]:
    """For each sample, a filler that brings its prompt to the target, or as near below it as the fillers go."""
    best = [("", tokens) for tokens in measure([(index, "") for index in range(samples)])]
    for piece in _FILLERS:
        wanted = {index: target - tokens for index, (_, tokens) in enumerate(best) if tokens < target}
        pieces = dict.fromkeys(wanted, 1)  # the first one shows what a piece costs
        for _ in range(_ROUNDS):
            trials = [(index, best[index][0] + piece * pieces[index]) for index in wanted]
            if not trials:
                break
            for (index, filler), tokens in zip(trials, measure(trials), strict=True):
                gained = tokens - best[index][1]
                if tokens > target:
                    pieces[index] //= 2
                elif gained > 0:
                    best[index] = (filler, tokens)
                    pieces[index] = (target - tokens) * pieces[index] // gained
                else:
                    pieces[index] = 0
                if pieces[index] == 0 or best[index][1] == target:
                    del wanted[index]
    return best
