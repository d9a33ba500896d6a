"""What the needle model learns from: a tokenizer, and the standard library's source as its tokens.

The tokenizer makes byte pairs within lines of Python source, single digits, and names of one token.
"""

from __future__ import annotations

import collections
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.needle.network import model_config
from bench.needle.settings import NAMES
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle.formats import all_forms
from flexprefill_fa.tools.needle.source import ascii_text, is_held_out, source_files

_SPECIAL = ("<pad>", "<bos>")
_COMMON_WORDS = 3000  # names are drawn from the most common words of the text
_TIMES = 2_000  # each form among the texts: enough for its words to become single tokens


class Corpus(NamedTuple):
    """A tokenizer, and the training files as its tokens, uint16 `[n]`."""

    tokenizer: Tokenizer
    tokens: np.ndarray


def build_corpus(files: int | None = None) -> Corpus:
    """From all files of this Python's standard library that are not held out, or the first `files` of them.

    The same Python version gives the same corpus.
    """
    texts = [ascii_text(file) for file in source_files() if not is_held_out(file)][:files]
    tokenizer = train_tokenizer(texts)
    return Corpus(tokenizer, encode(tokenizer, texts))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A tokenizer for `texts`; names are common words of theirs."""
    counted = collections.Counter(word for text in texts for word in re.findall(r"\b[a-z]{5,9}\b", text))
    words = sorted(counted, key=lambda word: (-counted[word], word))[:_COMMON_WORDS]
    if len(words) < NAMES:
        raise UsageError(f"the text must hold {NAMES} different words of 5 to 9 letters, got {len(words)}")
    names = sorted(random.Random(0).sample(words, NAMES))
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # So that a statement's tokens are the same before whatever line.
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model_config()["vocab_size"] - NAMES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(_SPECIAL),
        show_progress=False,
    )
    forms = [f"{form.prompt}{form.answer}{form.end}" for form in all_forms()]
    tokenizer.train_from_iterator(itertools.chain(texts, forms * _TIMES), trainer)
    tokenizer.add_tokens([AddedToken(f"#{name}", normalized=False) for name in names])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The tokens of texts one after the other, uint16."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encoded])
