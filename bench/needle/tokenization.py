"""The needle model's tokenizer: byte pairs within lines of Python source, single digits, and 512 names of one token."""

from __future__ import annotations

import collections
import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.needle.network import Shape
from bench.needle.settings import NAMES
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle.formats import all_forms

_SPECIAL = ("<pad>", "<bos>")
_COMMON_WORDS = 3000  # names are drawn from the most common words of the text
_TIMES = 2_000  # each form among the texts: enough for its words to become single tokens


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A tokenizer for `texts`; names are common words of theirs.

    Raises:
        UsageError: where the texts hold too few words.
    """
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
        vocab_size=Shape().vocabulary - NAMES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(_SPECIAL),
        show_progress=False,
    )
    forms = [f"{form.prompt}{form.answer}{form.end}" for form in all_forms()]
    tokenizer.train_from_iterator(itertools.chain(texts, forms * _TIMES), trainer)
    tokenizer.add_tokens([AddedToken(f"#{name}", normalized=False) for name in names])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and what `AutoTokenizer` reads beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, start = _SPECIAL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "pad_token": pad,
        "eos_token": pad,
        "model_max_length": Shape().positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
