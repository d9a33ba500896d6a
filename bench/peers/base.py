"""What an adapter of another implementation says, and how its code is imported and told from other states of it."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.workloads import Inputs
from flexprefill_fa.tools.rows import Row


@dataclass(frozen=True)
class Call:
    """A peer's function on given inputs.

    Attributes:
        settings: what it is called with besides the tensors.
        run: one call as a user makes it.
        check: one call; its output `[B, L, H, D]`, and kept blocks / all blocks where the peer tells it.
        select: its selection alone, where that is a step of its own.
    """

    settings: dict[str, Any]
    run: Callable[[], object]
    check: Callable[[], tuple[Any, float | None]]
    select: Callable[[], object] | None = None


Attend = Callable[[], Tensor]
"""One call over given blocks; its output `[B, L, H, D]`."""


@dataclass(frozen=True)
class Peer:
    """A public implementation.

    Attributes:
        name: of the implementation.
        selector: the same method here; None for a method that is not here, or none.
        module: dotted name, from the folder of its repository.
        function: what is called, by its name in there.
        adapter: module, queries, keys and values `[B, L, H, D]`, settings of the selector -> its call; None where it
            selects nothing itself.
        attend: module, queries, keys, values, kept blocks bool `[B, H, nq, nk]` of 128 tokens, which the query heads
            of a kv head share -> its attention over those; None where it takes no blocks.
        on_current_stream: whether all its kernels are launched on torch's current stream. One that is not runs while
            the others are captured, on what they have not written yet: such a peer is timed without a graph.
    """

    name: str
    selector: str | None
    module: str
    function: str
    adapter: Callable[[ModuleType, Tensor, Tensor, Tensor, Any], Call] | None
    attend: Callable[[ModuleType, Tensor, Tensor, Tensor, Tensor], Attend] | None = None
    on_current_stream: bool = True

    @property
    def file(self) -> Path:
        """The module's, in the folder."""
        return Path(*self.module.split(".")).with_suffix(".py")

    def load(self, folder: Path) -> ModuleType:
        """The module, imported; inside `foreign_code`.

        Raises:
            ImportError: where another module of that name is loaded already.
            Exception: whatever the import raises.
        """
        module = importlib.import_module(self.module)
        found = Path(module.__file__ or "").resolve()
        if found != (folder / self.file).resolve():
            raise ImportError(f"module {self.module} is {found}, not the one in {folder}")
        return module

    def tensors(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, copied once into contiguous `[B, L, H, D]`."""
        query, key, value = (x.transpose(1, 2).contiguous().clone() for x in inputs)
        return query, key, value

    def identity(self, folder: Path) -> Row:
        """What tells it and a state of its code from others: names, and a digest of the folder's Python files."""
        digest = hashlib.sha256()
        names = sorted(file.relative_to(folder) for file in folder.rglob("*.py") if file.is_file())
        for name in names:
            if not any(part.startswith(".") for part in name.parts):
                digest.update(str(name).encode() + b"\0" + (folder / name).read_bytes() + b"\0")
        return {
            "implementation": self.name,
            "module": self.module,
            "function": self.function,
            "peer_digest": digest.hexdigest()[:12],
        }

    @property
    def version(self) -> str | None:
        """Of its outermost package, where that is imported and says so."""
        version = getattr(sys.modules.get(self.module.partition(".")[0]), "__version__", None)
        return None if version is None else str(version)


@contextmanager
def foreign_code(folder: Path) -> Iterator[None]:
    """For imports and calls of a peer: its folder is first on the import path, and what it prints goes to stderr."""
    root = str(folder.resolve())
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if root in sys.path:  # unless the peer took it away itself
            sys.path.remove(root)
