"""`python -m bench.needle.prepare`: the token corpus, a folder with tokenizer, training text and held-out text.

The tokenizer makes byte pairs within lines of Python source, single digits, and names of one token.
"""

from __future__ import annotations

import collections
import itertools
import json
import platform
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.needle.network import model_config
from bench.needle.settings import NAMES
from bench.paths import ROOT
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.needle.formats import all_forms
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files, is_held_out, source_files

WORK = ROOT / "build" / "needle"
"""Where corpus and model are made; git ignores it."""

_TEXT = "text.npz"
_SPECIAL = ("<pad>", "<bos>")
_COMMON_WORDS = 3000  # names are drawn from the most common words of the text
_TIMES = 2_000  # each form among the texts: enough for its words to become single tokens


class Corpus(NamedTuple):
    """Text as tokens, in a folder: `train` and `held_out` are uint16 `[tokens]`, of different files."""

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray


def training_files() -> list[Path]:
    """The files that are not held out."""
    return [file for file in source_files() if not is_held_out(file)]


def build_corpus(folder: Path, files: int | None = None) -> Corpus:
    """Train a tokenizer on the training files, and write all text as tokens; of the first `files` of each part."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = ([ascii_text(file) for file in part[:files]] for part in (training_files(), held_out_files()))
    tokenizer = train_tokenizer(train)
    save_tokenizer(tokenizer, folder)
    # Last, so that a corpus without it is one that was not finished.
    np.savez(folder / _TEXT, train=encode(tokenizer, train), held_out=encode(tokenizer, held_out))
    return load_corpus(folder)


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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and what `AutoTokenizer` reads beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, start = _SPECIAL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "pad_token": pad,
        "eos_token": pad,
        "model_max_length": model_config()["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The tokens of texts one after the other, uint16."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encoded])


def load_corpus(folder: Path) -> Corpus:
    """Read a corpus back."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with np.load(folder / _TEXT) as text:
            return Corpus(folder, tokenizer, text["train"], text["held_out"])
    except Exception as error:  # tokenizers raises no narrower one
        again = "run 'python -m bench.needle.prepare' first"
        raise UsageError(f"no corpus in {folder} ({first_line(error)}): {again}") from error


def prepare(
    out: Annotated[Path, typer.Option(help="The work folder; the corpus goes to its folder 'corpus'.")] = WORK,
) -> None:
    """Make tokenizer and token corpus from the standard library of this Python, a tenth of its files held out.

    The same Python version gives the same corpus. It takes a minute.
    """
    with one_line_errors():
        corpus = build_corpus(out / "corpus")
    typer.echo(
        f"{len(corpus.train):,} tokens of {len(training_files())} files to train on, {len(corpus.held_out):,} of "
        f"{len(held_out_files())} held out, Python {platform.python_version()}: {corpus.folder}"
    )


if __name__ == "__main__":
    typer.run(prepare)
