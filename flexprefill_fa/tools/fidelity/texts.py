"""What the model reads: files, or the source and the prose that every Python brings."""

from __future__ import annotations

import hashlib
import sysconfig
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexprefill_fa.tools.evaluation.ruler import prose
from flexprefill_fa.tools.loading import UsageError, model_name, read_prompt

_SOURCE_START = 200_000  # characters: behind short private modules
_CHARACTERS_PER_TOKEN = 8  # more than enough for most text


@dataclass(frozen=True)
class Tokens:
    """The first tokens of a text, with what the tokenizer puts in front.

    Attributes:
        name: of the text.
        ids: as many as the longest length asks for.
    """

    name: str
    ids: Sequence[int]

    def first(self, length: int) -> list[int]:
        """The first `length` of them."""
        return list(self.ids[:length])

    def sha256(self, length: int) -> str:
        """Tells the first `length` of them from those of other texts and tokenizers."""
        return hashlib.sha256(array("q", self.ids[:length]).tobytes()).hexdigest()


def source() -> str:
    """Source code: modules of the standard library, one after the other."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in sorted(library.glob("*.py")) if not file.name.startswith("_sysconfigdata"))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    return text.encode("ascii", "ignore").decode()[_SOURCE_START:]


CORPORA: dict[str, Callable[[], str]] = {"source": source, "prose": lambda: " ".join(prose())}
"""The texts that are read where no file is named."""


def read_tokens(tokenizer: Any, files: Sequence[str], length: int) -> list[Tokens]:
    """The beginning of each file, or of `CORPORA` where there is none.

    Args:
        tokenizer: of the model.
        files: UTF-8 text; "-" is standard input.
        length: tokens of each.

    Raises:
        UsageError: for a file that cannot be read, or a text that is shorter.
    """
    if not files:
        return [first_tokens(tokenizer, name, text(), length) for name, text in CORPORA.items()]
    return [first_tokens(tokenizer, name, read_prompt(name), length) for name in files]


def first_tokens(tokenizer: Any, name: str, text: str, length: int) -> Tokens:
    """The beginning of a text; no more of it is encoded than that takes.

    Args:
        tokenizer: of the model.
        name: of the text, or the file that holds it.
        length: in tokens.

    Raises:
        UsageError: for a text that is shorter.
    """
    characters = _CHARACTERS_PER_TOKEN * length
    while len(ids := tokenizer(text[:characters])["input_ids"]) <= length and characters < len(text):
        characters *= 2
    if len(ids) < length:
        raise UsageError(
            f"the text {name} must have at least {length} tokens, the longest of --lengths, got {len(ids)}"
        )
    return Tokens(model_name(name), ids[:length])
