"""The text of the needle tasks: the standard library of the running interpreter, one part of it for training.

So whatever is made of it is a function of the Python version, and nearly the same wherever that came from.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

_HELD_OUT = 26  # of 256: about a tenth of the files

_LEFT_OUT = {
    *("site-packages", "dist-packages"),
    # What some installations have and others lack.
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"),
}
_NOT_EVALUATED = {
    "encodings",  # tables, most of them nearly the same as others
    "pydoc_data",  # one file of prose, as long as all others together
}
_BUILD = ("config-", "_sysconfigdata")  # how names begin that tell about one build of Python


@functools.cache
def source_files() -> tuple[Path, ...]:
    """The library's files, in the order of their paths."""
    library = _library()
    paths = (path.relative_to(library) for path in library.rglob("*.py"))
    return tuple(
        library / path
        for path in sorted(paths)
        if _LEFT_OUT.isdisjoint(path.parts) and not path.parts[0].startswith(_BUILD)
    )


def is_held_out(file: Path) -> bool:
    """Whether a file is kept from training; decided by its path in the library."""
    path = file.relative_to(_library()).as_posix()
    return hashlib.sha256(path.encode()).digest()[0] < _HELD_OUT


@functools.cache
def held_out_files() -> tuple[Path, ...]:
    """The files that were kept from training, for evaluation, without those that are long tables or prose.

    A few of their lines stand in training files too, where one module of the library was copied from another.
    """
    library = _library()
    return tuple(
        file
        for file in source_files()
        if is_held_out(file) and file.relative_to(library).parts[0] not in _NOT_EVALUATED
    )


@functools.cache
def ascii_text(file: Path) -> str:
    """The text of a file without the few characters that are not ASCII, and a line's end after it."""
    return file.read_text(encoding="utf-8", errors="ignore").encode("ascii", "ignore").decode() + "\n"


def shuffled(files: Sequence[Path], rng: random.Random) -> Iterator[str]:
    """The text of every file, in the order that `rng` gives them."""
    order = list(files)
    rng.shuffle(order)
    for file in order:
        yield ascii_text(file)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
