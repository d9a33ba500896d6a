"""The needle model's tasks for lm-evaluation-harness: RULER's retrieval and tracing, in the words it was trained on.

The haystack is Python source that the model was not trained on, and the question ends where the answer is due.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

from flexprefill_fa.tools.evaluation.budget import Sample
from flexprefill_fa.tools.evaluation.task_data import data_of
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED, Mix
from flexprefill_fa.tools.needle.prompts import key_words
from flexprefill_fa.tools.needle.questions import draw
from flexprefill_fa.tools.needle.source import held_out_files, shuffled


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the whole answer is right, word for word, else 0."""
    (answer,) = doc["outputs"]
    return {"exact": float(results[0].strip() == answer)}


@functools.cache
def _names() -> tuple[str, ...]:
    from tokenizers import Tokenizer

    return tuple(key_words(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))))


@dataclass(frozen=True)
class Needles:
    """Statements hidden in Python source, and one question about them.

    Attributes:
        mix: what is hidden and asked.
        new_tokens: of the answer in the needle model's tokens, as the task files say too.
    """

    mix: Mix
    new_tokens: int
    least_units: int = 16

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """As `Recipe.draw`; units are lines of source."""
        question = draw(self.mix, _names(), rng)
        depths = sorted(rng.random() for _ in question.statements)
        lines: list[str] = []
        for text in shuffled(held_out_files(), rng):
            lines += text.splitlines()
            if len(lines) >= units:
                break
        else:
            raise ValueError(f"the held-out text of this Python holds {len(lines)} lines, {units} are needed")
        pieces, start = [], 0
        for depth, statement in zip(depths, question.statements, strict=True):
            place = round(depth * units)
            pieces += [*(f"{line}\n" for line in lines[start:place]), statement]
            start = place
        pieces += [f"{line}\n" for line in lines[start:units]]
        return Sample(f"{filler}{''.join(pieces)}{question.prompt}", (question.answer,))


TASKS = {
    "single": Needles(EVALUATED["single"], 7),
    "multikey": Needles(EVALUATED["multikey"], 7),
    "multivalue": Needles(EVALUATED["multivalue"], 52),
    "multiquery": Needles(EVALUATED["multiquery"], 46),
    "vt": Needles(EVALUATED["vt"], 13),
}

single = data_of(TASKS["single"])
multikey = data_of(TASKS["multikey"])
multivalue = data_of(TASKS["multivalue"])
multiquery = data_of(TASKS["multiquery"])
vt = data_of(TASKS["vt"])
