"""Where a report goes: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from flexprefill_fa.tools.files import write_whole
from flexprefill_fa.tools.loading import UsageError


def check_out(out: Path, prompt_file: str) -> None:
    """Check that a report can be written there, before any work is done.

    Raises:
        UsageError: if `out` is a folder or the prompt file, or its folder is missing or cannot be written to.
    """
    folder = out.parent
    if out.is_dir():
        raise UsageError(f"cannot write the report to {out}: it is a folder, expected the name of a file")
    if not folder.is_dir():
        raise UsageError(f"cannot write the report to {out}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write the report to {out}: no permission to write to the folder {folder}")
    if out.exists() and prompt_file != "-" and Path(prompt_file).exists() and out.samefile(prompt_file):
        raise UsageError(f"cannot write the report to {out}: it is the prompt file")


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: what was there before stays until the new one is complete.

    Raises:
        UsageError: if it cannot be written.
    """
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write the report to {path}: {error.strerror or error}") from error
