"""Digests that tell models apart in rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "chat_template*")


def model_sha256(folder: str | Path) -> str:
    """SHA-256 of a model's config and weights, file by file."""
    return _sha256(folder, ("config.json", "*.safetensors", "*.bin"))


def tokenizer_sha256(folder: str | Path) -> str:
    """SHA-256 of the files of a model's tokenizer."""
    return _sha256(folder, _TOKENIZER_FILES)


def _sha256(folder: str | Path, patterns: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in Path(folder).glob(pattern)}):
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as data:
            while part := data.read(2**24):
                found.update(part)
    return found.hexdigest()
