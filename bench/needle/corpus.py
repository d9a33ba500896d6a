"""The token corpus of a training run: a folder with the tokenizer, training text and held-out text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.needle.tokenization import VOCABULARY, save_tokenizer, train_tokenizer
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle.formats import all_forms
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files, is_held_out, source_files

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

PACKAGES = ("numpy", "tokenizers", "safetensors")
"""What the needle model's commands need of the extra `bench`."""

_FACTS = "corpus.json"
_PARTS = {"train": "train.npy", "held_out": "held_out.npy"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_FILES_AT_ONCE = 64


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
        folder: where it lies.
        tokenizer: of its tokens.
        train, held_out: uint16 `[tokens]`, of different files.
        facts: what it was made of.
    """

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Tells corpora apart."""
        return self.facts["digest"]


def build_corpus(
    folder: Path, positions: int, seed: int = 0, advance: Callable[[], None] | None = None, files: int | None = None
) -> Corpus:
    """Train a tokenizer on the training files, and write all text as tokens.

    Args:
        folder: is made where it is missing.
        positions: of the model, for the tokenizer's files.
        seed: of the names that are single tokens.
        advance: called after every few files.
        files: use only the first so many of each part; for tests.

    Raises:
        UsageError: where this Python has too little source text.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": [file for file in source_files() if not is_held_out(file)][:files],
        "held_out": list(held_out_files())[:files],
    }
    texts = {name: [ascii_text(file) for file in chosen] for name, chosen in parts.items()}
    for name, found in texts.items():
        if not any(text.strip() for text in found):
            raise UsageError(f"the standard library of this Python has no source text for the {name} part")
    tokenizer = train_tokenizer(texts["train"], seed)
    save_tokenizer(tokenizer, folder, positions)
    tokens = {name: encode(tokenizer, found, advance) for name, found in texts.items()}
    for name, values in tokens.items():
        np.save(folder / _PARTS[name], values)
    facts = {
        "python": platform.python_version(),
        "seed": seed,
        "files": {name: len(chosen) for name, chosen in parts.items()},
        "tokens": {name: len(values) for name, values in tokens.items()},
        "words": _words(),
        "tokenizer": _sha256(folder / "tokenizer.json"),
    }
    facts["digest"] = _digest(tokens)
    # Last, so that a corpus without it is one that was not finished.
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return load_corpus(folder)


def encode(tokenizer: Tokenizer, texts: Sequence[str], advance: Callable[[], None] | None = None) -> np.ndarray:
    """The tokens of texts one after the other, uint16; `advance` is called after every few texts."""
    import numpy as np

    pieces = []
    for first in range(0, len(texts), _FILES_AT_ONCE):
        encoded = tokenizer.encode_batch(list(texts[first : first + _FILES_AT_ONCE]), add_special_tokens=False)
        pieces += [np.array(encoding.ids, dtype=np.uint16) for encoding in encoded]
        if advance is not None:
            advance()
    return np.concatenate(pieces)


def load_corpus(folder: Path) -> Corpus:
    """Read a corpus back.

    Raises:
        UsageError: where there is none, or it does not fit its tokenizer or this version of the tasks.
    """
    import numpy as np
    from tokenizers import Tokenizer

    again = "run 'python -m bench.needle.prepare' first"
    needed = (_FACTS, *_TOKENIZER_FILES, *_PARTS.values())
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"no corpus in {folder} ({missing[0]} is missing): {again}")
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        found = {name: np.load(folder / file) for name, file in _PARTS.items()}
        same = facts["words"] == _words() and facts["tokenizer"] == _sha256(folder / "tokenizer.json")
        whole = all(len(found[name]) == facts["tokens"][name] for name in _PARTS) and facts["digest"] == _digest(found)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the corpus in {folder} cannot be read ({error}): {again}") from error
    if not (same and whole):
        raise UsageError(f"the corpus in {folder} was made by another version of the tasks or tokenizer: {again}")
    return Corpus(folder, Tokenizer.from_file(str(folder / "tokenizer.json")), **found, facts=facts)


def copy_tokenizer(corpus: Corpus, folder: Path) -> None:
    """Put the tokenizer's files beside a model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        (folder / name).write_bytes((corpus.folder / name).read_bytes())


def _digest(tokens: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(tokens[name].tobytes() for name in _PARTS)).hexdigest()[:16]


def _words() -> str:
    """Tells versions of the tasks' words apart."""
    forms: Iterable[dict[str, Any]] = map(dataclasses.asdict, all_forms())
    return hashlib.sha256(json.dumps([VOCABULARY, *forms]).encode()).hexdigest()[:16]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
