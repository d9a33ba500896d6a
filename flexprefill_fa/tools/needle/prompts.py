"""The needle task: 7-digit numbers hidden in real Python source, and a question about one of them.

The source is what the model was not trained on of the running interpreter's standard library, some 245,000 tokens in
Python 3.11, so a prompt is a function of the Python version and the seed. The phrases are those the model was trained
on, token for token; every key is one token, `#word`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexprefill_fa.tools.needle.source import held_out_files, shuffled

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANSWER_DIGITS = 7
"""Length of an answer; each digit is one token."""

NEEDLE = "\nThe special magic number for {key} is {number}.\n"
QUESTION = "\nQuestion: what is the special magic number for {key}? Answer: the special magic number for {key} is "


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt, ending where the answer is due.

    Attributes:
        token_ids: the prompt's tokens, exactly as many as were asked for.
        key: the key that the question names, such as `#accepts`.
        answer: its number, `ANSWER_DIGITS` digits.
        needles: every hidden key and its number, in the order of their place in the prompt.
        positions: for each needle, the index of its first token in `token_ids`.
    """

    token_ids: list[int]
    key: str
    answer: str
    needles: dict[str, str]
    positions: list[int]


def build_prompt(tokenizer: Tokenizer, tokens: int, *, needles: int = 8, seed: int = 0) -> NeedlePrompt:
    """Hide `needles` numbers in `tokens` tokens of Python source, and ask for one of them.

    Args:
        tokenizer: the needle model's, as a `tokenizers.Tokenizer`.
        tokens: length of the whole prompt in tokens, question included.
        needles: how many numbers to hide, each under its own key, one of which is asked for.
        seed: chooses source files, keys, numbers and places.

    Raises:
        ValueError: if the needles do not fit, there are not enough keys, or not enough source text.
    """
    if needles < 1:
        raise ValueError(f"needles must be at least 1, got {needles}")
    keys = key_words(tokenizer)
    if needles > len(keys):
        raise ValueError(f"needles must be at most {len(keys)}, the number of the model's keys, got {needles}")
    rng = random.Random(seed)
    hidden = {key: f"{rng.randrange(10**ANSWER_DIGITS):0{ANSWER_DIGITS}d}" for key in rng.sample(keys, needles)}
    asked = rng.choice(list(hidden))

    question = _encode(tokenizer, QUESTION.format(key=asked))
    statements = [_encode(tokenizer, NEEDLE.format(key=key, number=number)) for key, number in hidden.items()]
    source_tokens = tokens - len(question) - sum(map(len, statements))
    if source_tokens < needles:
        least = tokens - source_tokens + needles
        raise ValueError(f"tokens must be at least {least} to hold {needles} needles and the question, got {tokens}")

    source = _source_tokens(tokenizer, source_tokens, rng)
    cuts = sorted(rng.sample(range(source_tokens), needles))
    token_ids: list[int] = []
    positions: list[int] = []
    for start, end, statement in zip([0, *cuts], cuts, statements, strict=False):
        token_ids += source[start:end]
        positions.append(len(token_ids))
        token_ids += statement
    token_ids += source[cuts[-1] :] + question
    return NeedlePrompt(token_ids, asked, hidden[asked], hidden, positions)


def another_question(tokenizer: Tokenizer, prompt: NeedlePrompt, key: str) -> NeedlePrompt:
    """The same text with a question about another of its keys.

    Raises:
        ValueError: for a key under which the prompt hides no number.
    """
    if key not in prompt.needles:
        raise ValueError(f"key must be one of {', '.join(prompt.needles)}, got {key!r}")
    text = prompt.token_ids[: -len(_encode(tokenizer, QUESTION.format(key=prompt.key)))]
    question = _encode(tokenizer, QUESTION.format(key=key))
    return NeedlePrompt(text + question, key, prompt.needles[key], prompt.needles, prompt.positions)


def is_correct(text: str, answer: str) -> bool:
    """Exact match: the generated text, without surrounding white space, is the answer and nothing else."""
    return text.strip() == answer


def key_words(tokenizer: Tokenizer) -> list[str]:
    """The words that numbers can be hidden under, sorted: the tokenizer's added tokens of the form `#word`."""
    return sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content[0] == "#")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _source_tokens(tokenizer: Tokenizer, count: int, rng: random.Random) -> list[int]:
    source: list[int] = []
    for text in shuffled(held_out_files(), rng):
        source += _encode(tokenizer, text)
        if len(source) >= count:
            return source[:count]
    raise ValueError(f"the held-out text of this Python holds {len(source)} tokens, {count} are needed")
