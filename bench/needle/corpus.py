"""The token corpus of a training run: a folder with the tokenizer, training text and held-out text."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bench.needle.tokenization import save_tokenizer, train_tokenizer
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files, is_held_out, source_files

_FACTS = "corpus.json"


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
        folder: where it lies.
        tokenizer: of its tokens.
        train, held_out: uint16 `[tokens]`, of different files.
        facts: the Python version, and for each part its files and tokens.
    """

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Tells corpora apart."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()


def build_corpus(folder: Path, files: int | None = None) -> Corpus:
    """Train a tokenizer on the training files, and write all text as tokens.

    Args:
        folder: is made where it is missing.
        files: use only the first so many of each part; for tests.

    Raises:
        UsageError: where this Python has too little source text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": [file for file in source_files() if not is_held_out(file)][:files],
        "held_out": list(held_out_files())[:files],
    }
    texts = {name: [ascii_text(file) for file in chosen] for name, chosen in parts.items()}
    tokenizer = train_tokenizer(texts["train"])
    save_tokenizer(tokenizer, folder)
    counts = {}
    for name, found in texts.items():
        tokens = encode(tokenizer, found)
        counts[name] = len(tokens)
        np.save(folder / f"{name}.npy", tokens)
    files_of = {name: len(chosen) for name, chosen in parts.items()}
    facts = {"python": platform.python_version(), "files": files_of, "tokens": counts}
    # Last, so that a corpus without it is one that was not finished.
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return load_corpus(folder)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The tokens of texts one after the other, uint16."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encoded])


def load_corpus(folder: Path) -> Corpus:
    """Read a corpus back.

    Raises:
        UsageError: where there is none, or a broken one.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        parts = {name: np.load(folder / f"{name}.npy") for name in ("train", "held_out")}
        if any(len(tokens) != facts["tokens"][name] for name, tokens in parts.items()):
            raise ValueError("its parts are of different runs")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no narrower one
        again = "run 'python -m bench.needle.prepare' first"
        raise UsageError(f"no corpus in {folder} ({first_line(error)}): {again}") from error
    return Corpus(folder, tokenizer, **parts, facts=facts)
