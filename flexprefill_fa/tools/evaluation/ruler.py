"""RULER's tasks that need no downloaded data (Hsieh et al., 2024, arXiv 2404.06654), with its published parameters.

The wording of prompts is RULER's (Apache-2.0), so that scores compare with published ones. Where RULER's haystack is a
collection of essays that has to be downloaded, ours is the English prose of Python's own reference manual, which comes
with every interpreter.
"""

from __future__ import annotations

import functools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from flexprefill_fa.tools.evaluation.budget import Recipe, Sample
from flexprefill_fa.tools.loading import UsageError

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = 40  # places along the haystack at which needles are hidden


@functools.cache
def _words(*categories: str) -> tuple[str, ...]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise UsageError("RULER's tasks need wonderwords: pip install 'flexprefill-fa[eval]'") from error
    return tuple(sorted({word for name in categories for word in RandomWord().filter(include_categories=[name])}))


def _word_pair(rng: random.Random) -> str:
    return f"{rng.choice(_words('adjective'))}-{rng.choice(_words('noun'))}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_KINDS: dict[str, Callable[[random.Random], str]] = {"words": _word_pair, "numbers": _number, "uuids": _uuid}


@functools.cache
def prose() -> tuple[str, ...]:
    """The words of Python's reference manual as `help()` shows it, without its rules of asterisks and hyphens."""
    from pydoc_data.topics import topics

    text = re.sub(r"(?m)^\W+$", " ", "\n".join(topics[name] for name in sorted(topics)))
    return tuple(text.encode("ascii", "ignore").decode().split())


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: values hidden under keys, some of which are asked for.

    Attributes:
        haystack: "noise" (one line of five sentences, repeated), "needles" (other needles), or "prose".
        keys, values: what keys and values are: "words", "numbers" or "uuids".
        keys_hidden, values_per_key, keys_asked: how many.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    keys_hidden: int = 1
    values_per_key: int = 1
    keys_asked: int = 1
    new_tokens: int = 128

    @property
    def least_units(self) -> int:
        """Enough for every needle to have a place of its own."""
        return 400 if self.haystack == "prose" else self.keys_hidden * self.values_per_key

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """As `Recipe.draw`; units are lines, or words of prose."""
        hidden: dict[str, list[str]] = {}
        while len(hidden) < self.keys_hidden:
            hidden[_KINDS[self.keys](rng)] = [_KINDS[self.values](rng) for _ in range(self.values_per_key)]
        asked = rng.sample(sorted(hidden), self.keys_asked)
        needles = [self._needle(key, value) for key, values in hidden.items() for value in values]
        rng.shuffle(needles)
        context = self._hide(needles, units, rng)
        plural = self.keys_asked * self.values_per_key > 1
        kind = self.values if plural else self.values[:-1]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        some, verb, what = ("Some", "are", "What are all") if plural else ("A", "is", "What is")
        about = f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize it."
        prompt = (
            f"{about} I will quiz you about the {kind} afterwards.{filler}\n{context}\n"
            f"{what} the special magic {kind} for {query} mentioned in the provided text?"
        )
        prefix = f"The special magic {kind} for {query} mentioned in the provided text {verb}"
        return Sample(prompt, tuple(chain.from_iterable(hidden[key] for key in asked)), prefix)

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _hide(self, needles: list[str], units: int, rng: random.Random) -> str:
        if self.haystack == "prose":
            words = prose()
            text = [words[index % len(words)] for index in range(units)]
            ends = [0, *(index + 1 for index, word in enumerate(text) if word.endswith(".")), units]
            places = sorted(rng.sample(range(_DEPTHS), len(needles)))
            for needle, place in zip(reversed(needles), reversed(places), strict=True):
                text.insert(ends[place * (len(ends) - 1) // (_DEPTHS - 1)], needle)
            return " ".join(text)
        places = sorted(_spread(rng, units, len(needles)), reverse=True)
        kinds = _KINDS[self.keys], _KINDS[self.values]
        repeated = self.haystack == "noise"
        lines = [_NOISE if repeated else self._needle(kinds[0](rng), kinds[1](rng)) for _ in range(units)]
        for needle, place in zip(needles, places, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _spread(rng: random.Random, units: int, places: int) -> list[int]:
    """Different places in [0, units], from as many draws whatever `units` is."""
    shares = [rng.random() for _ in range(places)]
    chosen: set[int] = set()
    for share in shares:
        place = int(share * (units + 1))
        while place in chosen:
            place = (place + 1) % (units + 1)
        chosen.add(place)
    return list(chosen)


@dataclass(frozen=True)
class VariableTracking:
    """Which variables hold a value that is handed on along a chain of assignments; one solved example goes before."""

    chains: int = 1
    hops: int = 4
    new_tokens: int = 30
    least_units: int = 10

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """As `Recipe.draw`; units are lines of noise."""
        example = self._question(15, "", rng, letters=3)
        asked = self._question(units, filler, rng, letters=5)
        return replace(asked, prompt=f"{example.text} {' '.join(example.outputs)}\n\n{asked.prompt}")

    def _question(self, units: int, filler: str, rng: random.Random, letters: int) -> Sample:
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        lines = [_NOISE] * units
        asked = ""
        for number in range(self.chains):
            chain_names = names[number * (self.hops + 1) : (number + 1) * (self.hops + 1)]
            value = str(rng.randint(10000, 99998))
            asked = asked or value
            links = [f"VAR {chain_names[0]} = {value}"]
            links += [f"VAR {new} = VAR {old}" for old, new in pairwise(chain_names)]
            for place, link in zip(sorted(_spread(rng, units, len(links)))[::-1], links[::-1], strict=True):
                lines.insert(place, link)
        context = "\n".join(lines)
        prompt = (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.{filler}\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {asked} in the text above."
        )
        prefix = (
            f"Answer: According to the chain(s) of variable assignment in the text above, {self.hops + 1} variables "
            f"are assgined the value {asked}, they are:"  # the spelling is RULER's
        )
        return Sample(prompt, tuple(names[: self.hops + 1]), prefix)


@dataclass(frozen=True)
class CommonWords:
    """The ten words that come thirty times in a numbered list in which others come three times; with one example."""

    new_tokens: int = 120
    least_units: int = 1
    common: int = 10

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """As `Recipe.draw`; units are uncommon words. Prompts below 4,096 tokens have RULER's smaller numbers."""
        small = length < 4096
        example = self._question("", rng, *((20, 3, 1) if small else (40, 10, 3)))
        asked = self._question(filler, rng, self.common + units, *((6, 1) if small else (30, 3)))
        return replace(asked, prompt=f"{example.text} {_numbered(example.outputs)}\n{asked.prompt}")

    def _question(self, filler: str, rng: random.Random, words: int, often: int, seldom: int) -> Sample:
        known = list(_words("noun", "adjective", "verb"))
        rng.shuffle(known)
        while len(known) < words:  # long lists need more words than there are: pairs then
            known.append(_word_pair(rng))
        common, uncommon = known[: self.common], known[self.common : words]
        listed = common * often + uncommon * seldom
        rng.shuffle(listed)
        prompt = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.{filler}\n{_numbered(listed)}\n"
            f"Question: What are the {self.common} most common words in the above list?"
        )
        prefix = f"Answer: The top {self.common} words that appear most often in the list are:"
        return Sample(prompt, tuple(common), prefix)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


@dataclass(frozen=True)
class FrequentWords:
    """The three most frequent of many made-up words, whose counts follow a zeta distribution."""

    alpha: float = 2.0
    letters: int = 6
    new_tokens: int = 50
    least_units: int = 30

    def draw(self, units: int, filler: str, rng: random.Random, length: int) -> Sample:
        """As `Recipe.draw`; units are words of text. The first rank is dots, which the question says to ignore."""
        size = max(length // 50, 4)
        vocabulary: dict[str, None] = {"...": None}
        while len(vocabulary) < size:
            vocabulary["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
        coded = list(vocabulary)
        zeta = math.fsum(rank**-self.alpha for rank in range(1, 10**5)) if self.alpha != 2 else math.pi**2 / 6
        text = [word for rank, word in enumerate(coded, 1) for _ in range(int(units * rank**-self.alpha / zeta))]
        rng.shuffle(text)
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words.{filler} {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore "
            "the dots '....'. What are the three most frequently appeared words in the above coded text?"
        )
        prefix = "Answer: According to the coded text above, the three most frequently appeared words are:"
        return Sample(prompt, tuple(coded[1:4]), prefix)


RECIPES: dict[str, Recipe] = {
    "niah_single_1": Niah("noise"),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("prose", values_per_key=4),
    "niah_multiquery": Niah("prose", keys_hidden=4, keys_asked=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
"""The tasks, by RULER's names."""


def score(text: str, outputs: list[str]) -> float:
    """RULER's string match: the share of the outputs that the text holds, whatever their case."""
    said = text.lower()
    return sum(output.lower() in said for output in outputs) / len(outputs)
