"""A question of one of the needle tasks as text: the statements to hide, the question, the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from flexprefill_fa.tools.needle.formats import (
    ANSWER_DIGITS,
    ASSIGNMENT,
    CHAIN,
    HAND_ON,
    NEEDLE_FORM,
    QUESTION_FORM,
    VALUE_DIGITS,
    VARIABLES_FORM,
    Form,
    Mix,
    all_keys_form,
    all_values_form,
    numbered_needle,
)


@dataclass(frozen=True)
class Question:
    """What to hide and to ask.

    Attributes:
        statements: in the order in which they may stand in the text.
        prompt: the question, up to where the answer is due.
        answer: the words that the model was trained to say.
    """

    statements: tuple[str, ...]
    prompt: str
    answer: str


def draw(mix: Mix, names: Sequence[str], rng: random.Random) -> Question:
    """A question of the one kind that `mix` asks.

    Raises:
        ValueError: where it asks several questions, or none.
    """
    if mix.asked + mix.queries + mix.lists_asked + mix.chains_asked != 1:
        raise ValueError(f"a text must ask one question, got {mix}")
    chosen = rng.sample(names, mix.names)
    keys, list_keys = chosen[: mix.needles], chosen[mix.needles : mix.needles + mix.lists]
    variables = chosen[mix.needles + mix.lists :]
    numbers = [_number(rng, ANSWER_DIGITS) for _ in keys]
    values = [[_number(rng, ANSWER_DIGITS) for _ in range(mix.several)] for _ in list_keys]
    chains = [variables[first : first + CHAIN] for first in range(0, len(variables), CHAIN)]
    held = [_number(rng, VALUE_DIGITS) for _ in chains]

    needles = [[NEEDLE_FORM.write([key], [number])] for key, number in zip(keys, numbers, strict=True)]
    lists = [
        [numbered_needle(place).write([key], [number]) for place, number in enumerate(found)]
        for key, found in zip(list_keys, values, strict=True)
    ]
    links = [
        [ASSIGNMENT.write(found[:1], [value]), *(HAND_ON.write([new, old]) for old, new in pairwise(found))]
        for found, value in zip(chains, held, strict=True)
    ]
    statements = _interleaved([*needles, *lists, *links], rng)
    if mix.asked:
        return _question(statements, QUESTION_FORM, keys[:1], numbers[:1])
    if mix.queries:
        return _question(statements, all_keys_form(mix.several), keys[: mix.several], numbers[: mix.several])
    if mix.lists_asked:
        return _question(statements, all_values_form(mix.several), list_keys[:1], values[0])
    return _question(statements, VARIABLES_FORM, chains[0], held[:1])


def _question(statements: tuple[str, ...], form: Form, names: Sequence[str], numbers: Sequence[str]) -> Question:
    return Question(statements, form.write(names, numbers), form.answer.format(name=names, number=numbers))


def _interleaved(groups: list[list[str]], rng: random.Random) -> tuple[str, ...]:
    """All statements in an order that chance gives, but within each group in its own."""
    turns = list(chain.from_iterable([number] * len(group) for number, group in enumerate(groups)))
    rng.shuffle(turns)
    left = [iter(group) for group in groups]
    return tuple(next(left[turn]) for turn in turns)


def _number(rng: random.Random, digits: int) -> str:
    return f"{rng.randrange(10**digits):0{digits}d}"
