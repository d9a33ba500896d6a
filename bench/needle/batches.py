"""Training and evaluation sequences as tensors: statements and questions scattered through source text.

Everything is drawn on the device of the text, from a generator that the caller seeds; rows of a batch have the same
numbers of statements and questions, in another order, at other places, with other names and numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Generator, Tensor

from flexprefill_fa.tools.needle import formats
from flexprefill_fa.tools.needle.formats import ANSWER_DIGITS, CHAIN, VALUE_DIGITS, Form, Mix, lay_out
from flexprefill_fa.tools.needle.prompts import key_words

TASKS = ("multikey", "multivalue", "multiquery", "vt")
"""What questions are told apart in training, where a single needle is one of many keys."""

_HEAPS = 8  # about so many places where statements stand together
_LITERAL_WEIGHT = 0.5  # words of an answer that are the same each time, beside 1 for its names and digits


@dataclass(frozen=True)
class Batch:
    """Sequences and what is to be learnt from them.

    Attributes:
        tokens: `[B, n]`.
        places: `[B, A]`, positions of the tokens of all answers.
        source: `[B, n]`, positions that hold source text.
        weights: `[A]` of the tokens of answers: 1 for names and digits, less for words that are always the same.
        scored: `[A]`, what an answer must say: not its end.
        columns: for each task in the batch, its index in `TASKS` and which of the A places are its.
    """

    tokens: Tensor
    places: Tensor
    source: Tensor
    weights: Tensor
    scored: Tensor
    columns: list[tuple[int, Tensor]]

    @property
    def targets(self) -> Tensor:
        """`[B, A]`, the tokens of all answers."""
        return self.tokens.gather(1, self.places)


class _Words(NamedTuple):
    """A form's tokens and holes `[len]`; weights and scored, as in a batch, of those from `answer` on."""

    answer: int
    literals: Tensor
    holes: Tensor
    weights: Tensor
    scored: Tensor


class _Units(NamedTuple):
    """Statements or questions of one form: tokens `[B, count, len]` and times `[B, count]`, which order a sequence."""

    words: _Words
    tokens: Tensor
    times: Tensor
    task: int


class Builder:
    """Builds sequences from the tokens of a text, uint16 `[tokens]`, on a device."""

    def __init__(self, tokenizer: Tokenizer, text: np.ndarray, device: torch.device):
        self._tokenizer = tokenizer
        self._text = torch.from_numpy(text.astype("int32")).to(device)
        # Moving a list to the GPU waits for all that it has to do, so what is always the same is moved once.
        self._words = functools.cache(self._words_of)
        self._names, self._digits = (
            torch.tensor([tokenizer.token_to_id(word) for word in words], device=device)
            for words in (key_words(tokenizer), "0123456789")
        )

    def build(
        self, rows: int, length: int, mix: Mix, generator: Generator, questions_last: bool = False, heaped: float = 0.0
    ) -> Batch:
        """Draw `rows` sequences of `length` tokens that hold a mix, from a generator of the text's device.

        With `questions_last` they ask behind all statements, and end with a question, as evaluation does. `heaped` is
        the share of them whose statements and questions stand at a few places, one right behind the other.
        """
        units = self._draw(rows, mix, generator)
        device = self._text.device
        counts = [unit.tokens.shape[1:] for unit in units]
        source = length - (total := sum(count * size for count, size in counts))
        if source < 1:
            raise ValueError(f"length must be at least {total + 1} tokens for this mix, got {length}")
        if source >= len(self._text):
            raise ValueError(f"the text must have more than {source} tokens, got {len(self._text)}")
        if questions_last:
            for unit in units:
                if len(unit.words.weights):
                    unit.times.add_(1)
        # The units in their order, each after its share of the source text.
        order = torch.cat([unit.times for unit in units], 1).argsort(1)
        cuts = torch.randint(source + 1, order.shape, device=device, generator=generator).sort(1)[0]
        grain = max(1, source // _HEAPS)
        in_heaps = torch.rand(rows, 1, device=device, generator=generator) < heaped
        cuts = torch.where(in_heaps, cuts - cuts % grain, cuts)
        if questions_last:
            cuts[:, -1] = source
        ordered = torch.cat([torch.full((count,), size, device=device) for count, size in counts])[order]
        starts = torch.empty_like(cuts).scatter_(1, order, cuts + ordered.cumsum(1) - ordered)

        tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        is_source = torch.ones(rows, length, dtype=torch.bool, device=device)
        places, columns = [], []
        first = answered = 0
        for unit, (count, size) in zip(units, counts, strict=True):
            at = starts[:, first : first + count, None] + torch.arange(size, device=device)
            first += count
            tokens.scatter_(1, at.flatten(1), unit.tokens.flatten(1))
            is_source.scatter_(1, at.flatten(1), False)
            places.append(at[..., unit.words.answer :].flatten(1))
            if due := count * len(unit.words.weights):
                columns.append((unit.task, torch.arange(answered, answered + due, device=device)))
                answered += due
        begin = torch.randint(len(self._text) - source, (rows, 1), device=device, generator=generator)
        text = self._text[begin + torch.arange(source, device=device)]
        # Source text runs on behind each unit where it stopped before it.
        reading = (is_source.cumsum(1) - 1).clamp(min=0)
        tokens = torch.where(is_source, text.long().gather(1, reading), tokens)
        weights = torch.cat([unit.words.weights.repeat(unit.tokens.shape[1]) for unit in units])
        scored = torch.cat([unit.words.scored.repeat(unit.tokens.shape[1]) for unit in units])
        columns.sort(key=lambda column: column[0])
        return Batch(tokens, torch.cat(places, 1), is_source, weights, scored, columns)

    def _draw(self, rows: int, mix: Mix, generator: Generator) -> list[_Units]:
        device = self._text.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(rows, *shape, device=device, generator=generator)

        def digits(*shape: int) -> Tensor:
            return self._digits[torch.randint(10, (rows, *shape), device=device, generator=generator)]

        if mix.names > len(self._names):
            raise ValueError(f"a sequence must have at most {len(self._names)} names, got {mix.names}")
        names = self._names[uniform(len(self._names)).argsort(1)[:, : mix.names]]
        keys, list_keys, variables = names.split((mix.needles, mix.lists, CHAIN * mix.chains), 1)
        units = []

        numbers, times = digits(mix.needles, ANSWER_DIGITS), uniform(mix.needles)
        if mix.needles:
            units.append(self._fill(formats.NEEDLE_FORM, keys[..., None], numbers, times))

        def ask(form: Form, asked: Tensor, count: int, task: str) -> None:
            """`count` questions about needles `[B, count x each]`."""
            several = (count, asked.shape[1] // count)
            when = _later(times.gather(1, asked).unflatten(1, several).amax(2), uniform(count))
            found = numbers.gather(1, asked[..., None].expand(-1, -1, ANSWER_DIGITS)).unflatten(1, several).flatten(2)
            units.append(self._fill(form, keys.gather(1, asked).unflatten(1, several), found, when, task))

        if mix.asked:
            ask(formats.QUESTION_FORM, uniform(mix.needles).argsort(1)[:, : mix.asked], mix.asked, "multikey")
        if mix.queries:
            asked = uniform(mix.queries, mix.needles).argsort(2)[..., : mix.several].flatten(1)
            ask(formats.all_keys_form(mix.several), asked, mix.queries, "multiquery")
        if mix.lists:
            numbers, times = digits(mix.lists, mix.several, ANSWER_DIGITS), uniform(mix.lists, mix.several).sort(2)[0]
            for place in range(mix.several):
                form = formats.numbered_needle(place)
                units.append(self._fill(form, list_keys[..., None], numbers[:, :, place], times[..., place]))
            count, form = mix.lists_asked, formats.all_values_form(mix.several)
            when, found = _later(times[:, :count, -1], uniform(count)), numbers[:, :count].flatten(2)
            units.append(self._fill(form, list_keys[:, :count, None], found, when, "multivalue"))
        if mix.chains:
            chain = variables.unflatten(1, (mix.chains, CHAIN))
            values, times = digits(mix.chains, VALUE_DIGITS), uniform(mix.chains, CHAIN).sort(2)[0]
            units.append(self._fill(formats.ASSIGNMENT, chain[..., :1], values, times[..., 0]))
            pairs = torch.stack((chain[..., 1:], chain[..., :-1]), -1).flatten(1, 2)
            none = values.new_empty(rows, pairs.shape[1], 0)
            units.append(self._fill(formats.HAND_ON, pairs, none, times[..., 1:].flatten(1)))
            count = mix.chains_asked
            when = _later(times[:, :count, -1], uniform(count))
            units.append(self._fill(formats.VARIABLES_FORM, chain[:, :count], values[:, :count], when, "vt"))
        return units

    def _fill(self, form: Form, names: Tensor, digits: Tensor, times: Tensor, task: str = TASKS[0]) -> _Units:
        """A form with names `[B, count, K]` and digits `[B, count, D]` in its holes."""
        words = self._words(form)
        filled = torch.cat((names, digits), -1)[..., words.holes.clamp(min=0)]
        return _Units(words, torch.where(words.holes >= 0, filled, words.literals), times, TASKS.index(task))

    def _words_of(self, form: Form) -> _Words:
        layout, moved = lay_out(form, self._tokenizer), partial(torch.tensor, device=self._text.device)
        due = range(layout.answer, len(layout.literals))
        weights = [1.0 if layout.holes[place] >= 0 else _LITERAL_WEIGHT for place in due]
        scored = moved([place < layout.end for place in due], dtype=torch.bool)
        return _Words(layout.answer, moved(layout.literals), moved(layout.holes), moved(weights), scored)


def _later(after: Tensor, share: Tensor) -> Tensor:
    """A time between `after` and the end, 1."""
    return after + share * (1 - after)
