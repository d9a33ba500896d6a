"""The words of the needle tasks: what is hidden in the text, how it is asked for, and how the answer goes on.

Training builds these as tensors of tokens, evaluation as text (`text_tasks`); both take the words from here. A name is
one token, `#word`, and so is each digit, so the tokens of a form differ from one use to the next in its holes alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, NEEDLE, QUESTION

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VALUE_DIGITS = 5
"""Digits of a variable's value, as in RULER."""

CHAIN = 5
"""Variables of a chain: one that is given the value, and four hops."""

MOST = 4
"""Values of one key, or keys asked for at once, at most; two at least."""

_HOLE = re.compile(r"\{(name|number)\[(\d)\]\}")


@dataclass(frozen=True)
class Form:
    """A statement, or a question with its answer.

    Attributes:
        prompt: with holes `{name[i]}` and `{number[i]}`; a question's ends where the answer is due.
        answer: with holes; empty for a statement.
        end: what shows that the answer is complete. The model learns to say it, and nobody is asked for it.
        digits: of each number.
    """

    prompt: str
    answer: str = ""
    end: str = ""
    digits: int = ANSWER_DIGITS

    def write(self, names: Sequence[str], numbers: Sequence[str] = ()) -> str:
        """The text of the prompt with its holes filled."""
        return self.prompt.format(name=names, number=numbers)


def _keyed(text: str) -> str:
    return text.format(key="{name[0]}", number="{number[0]}")


NEEDLE_FORM = Form(_keyed(NEEDLE))
"""A number under a key."""

QUESTION_FORM = Form(_keyed(QUESTION), "{number[0]}", ".\n")
"""The number under a key."""

ASSIGNMENT = Form("\nVAR {name[0]} = {number[0]}\n", digits=VALUE_DIGITS)
"""A variable that is given a value."""

HAND_ON = Form("\nVAR {name[0]} = VAR {name[1]}\n", digits=VALUE_DIGITS)
"""A variable that is given another's value."""

VARIABLES_FORM = Form(
    f"\nQuestion: which {CHAIN} variables hold the value {{number[0]}}? Answer: the variables that hold the value "
    "{number[0]} are ",
    ", ".join(f"{{name[{place}]}}" for place in range(CHAIN)),
    ".\n",
    VALUE_DIGITS,
)
"""The variables of a chain, in its order."""


def numbered_needle(place: int) -> Form:
    """One of several numbers under a key, by its place from 0 among them."""
    return Form(f"\nThe special magic number {place + 1} for {{name[0]}} is {{number[0]}}.\n")


def all_values_form(values: int) -> Form:
    """All numbers under one key, in the order of the text."""
    entries = [f"{place + 1} for {{name[0]}} is {{number[{place}]}}" for place in range(values)]
    start, answer = _from_first_number(f"the special magic number {', '.join(entries)}")
    question = f"\nQuestion: what are the {values} special magic numbers for {{name[0]}}? Answer: "
    return Form(question + start, answer, ".\n")


def all_keys_form(keys: int) -> Form:
    """The numbers under several keys, each after its key."""
    names = [f"{{name[{place}]}}" for place in range(keys)]
    entries = [f"for {name} is {{number[{place}]}}" for place, name in enumerate(names)]
    start, answer = _from_first_number(f"the special magic number {', '.join(entries)}")
    question = f"\nQuestion: what are the special magic numbers for {', '.join(names)}? Answer: "
    return Form(question + start, answer, ".\n")


def _from_first_number(text: str) -> tuple[str, str]:
    place = text.index("{number[0]}")
    return text[:place], text[place:]


@dataclass(frozen=True)
class Mix:
    """What one text hides, and what is asked about it. Every name is used for one thing.

    Attributes:
        needles: numbers, each under its own key.
        asked: questions about one of them.
        queries: questions about `several` of them at once.
        lists: keys with `several` numbers each.
        lists_asked: questions about all numbers of one of those keys.
        chains: chains of variables.
        chains_asked: questions about all variables of one of them.
        several: 2 to `MOST`.

    Raises:
        ValueError: for a question about what is not there.
    """

    needles: int = 0
    asked: int = 0
    queries: int = 0
    lists: int = 0
    lists_asked: int = 0
    chains: int = 0
    chains_asked: int = 0
    several: int = MOST

    def __post_init__(self) -> None:
        if not 2 <= self.several <= MOST:
            raise ValueError(f"several must be from 2 to {MOST}, got {self.several}")
        wanted = max(self.asked, self.several if self.queries else 0)
        for name, there, needed in (
            ("needles", self.needles, wanted),
            ("lists", self.lists, self.lists_asked),
            ("chains", self.chains, self.chains_asked),
        ):
            if there < needed:
                raise ValueError(f"{name} must be at least {needed} for what is asked about them, got {there}")

    @property
    def names(self) -> int:
        """Names that one text takes."""
        return self.needles + self.lists + CHAIN * self.chains


EVALUATED = {
    "single": Mix(needles=1, asked=1),
    "multikey": Mix(needles=32, asked=1),
    "multivalue": Mix(lists=4, lists_asked=1),
    "multiquery": Mix(needles=16, queries=1),
    "vt": Mix(chains=4, chains_asked=1),
}
"""The tasks of an evaluation: one question each, at the end of the text."""


def all_forms() -> list[Form]:
    """Every form, for a tokenizer to learn their words."""
    several = range(2, MOST + 1)
    return [
        NEEDLE_FORM,
        QUESTION_FORM,
        ASSIGNMENT,
        HAND_ON,
        VARIABLES_FORM,
        *(numbered_needle(place) for place in range(MOST)),
        *(all_values_form(values) for values in several),
        *(all_keys_form(keys) for keys in several),
    ]


@dataclass(frozen=True)
class Layout:
    """The tokens of a form, for building many of them at once.

    A form with K names and M numbers of D digits takes its holes from a vector of K name tokens and then M x D digit
    tokens.

    Attributes:
        literals: a token for each position; 0 in holes.
        holes: for each position the index into that vector, -1 outside holes.
        answer: positions from here on are the answer and its end.
        end: positions from here on are the end.
        names: K.
    """

    literals: tuple[int, ...]
    holes: tuple[int, ...]
    answer: int
    end: int
    names: int


def lay_out(form: Form, tokenizer: Tokenizer) -> Layout:
    """The tokens of a form.

    Raises:
        ValueError: where the tokens of the words between the holes depend on what is in the holes.
    """
    pieces = (form.prompt, form.answer, form.end)
    names = len({match[2] for text in pieces for match in _HOLE.finditer(text) if match[1] == "name"})
    literals: list[int] = []
    holes: list[int] = []
    starts = []
    for text in pieces:
        starts.append(len(literals))
        position = 0
        for match in _HOLE.finditer(text):
            _add(tokenizer, text[position : match.start()], literals, holes)
            first = int(match[2]) if match[1] == "name" else names + int(match[2]) * form.digits
            count = 1 if match[1] == "name" else form.digits
            literals += [0] * count
            holes += range(first, first + count)
            position = match.end()
        _add(tokenizer, text[position:], literals, holes)
    return Layout(tuple(literals), tuple(holes), starts[1], starts[2], names)


def _add(tokenizer: Tokenizer, text: str, literals: list[int], holes: list[int]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    literals += tokens
    holes += [-1] * len(tokens)
