"""The needle model's tasks for lm-evaluation-harness: RULER's retrieval of keys, in the words the model was trained on.

The haystack is Python source, `#word` is a key, and the question ends where the digits are due.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from bench.needle import MODEL_DIR
from bench.needle.prompts import ANSWER_DIGITS, NEEDLE, QUESTION, key_words, shuffled_source
from flexprefill_fa.evaluation.budget import Sample
from flexprefill_fa.evaluation.task_data import data_of, process_results

__all__ = ["process_results"]


@functools.cache
def _keys() -> tuple[str, ...]:
    from tokenizers import Tokenizer

    return tuple(key_words(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))))


@dataclass(frozen=True)
class Needles:
    """`needles` numbers hidden in Python source, each under its own key, one of which is asked for."""

    needles: int
    new_tokens: int = ANSWER_DIGITS
    least_units: int = 16

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """As `Recipe.draw`; units are lines of source."""
        hidden = {
            key: f"{rng.randrange(10**ANSWER_DIGITS):0{ANSWER_DIGITS}d}" for key in rng.sample(_keys(), self.needles)
        }
        asked = rng.choice(list(hidden))
        depths = sorted(rng.random() for _ in hidden)
        lines: list[str] = []
        for text in shuffled_source(rng):
            lines += text.splitlines()
            if len(lines) >= units:
                break
        else:
            raise ValueError(f"the standard library of this Python holds {len(lines)} lines, {units} are needed")
        pieces, start = [], 0
        for depth, (key, number) in zip(depths, hidden.items(), strict=True):
            place = int(depth * (units + 1))
            pieces += [*lines[start:place], NEEDLE.format(key=key, number=number)]
            start = place
        context = "\n".join([*pieces, *lines[start:units]])
        return Sample(f"{filler}{context}{QUESTION.format(key=asked)}", (hidden[asked],))


single = data_of(Needles(1))
multikey = data_of(Needles(8))
