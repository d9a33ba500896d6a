"""Functions of other implementations, found by name in a folder and called with their own signatures."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.workloads import Inputs
from flexprefill_fa.rows import Row


@dataclass(frozen=True)
class Peer:
    """A function in a folder, not imported yet.

    Attributes:
        function: its name, a key of `SELECTORS`.
        module: dotted name of the module that defines it.
        file: that module's file.
        root: the folder that must be on the import path.
        also: files that define the same name and were passed over.
    """

    function: str
    module: str
    file: Path
    root: Path
    also: tuple[Path, ...] = ()

    @property
    def implementation(self) -> str:
        """Name of the outermost package."""
        return self.module.partition(".")[0]


SELECTORS = {"flex_prefill_attention": "flexprefill", "flash_prefill": "flashprefill"}
"""The published functions that can be called, and the selector whose method each one is."""


def find_peers(folder: Path) -> list[Peer]:
    """The published functions that modules under a folder define, each once; nothing is imported.

    Of several modules that define one name the outermost counts, the first by name among equals. The folder may be a
    package itself, hold packages, or be a checkout that does.
    """
    defined: dict[str, list[Path]] = {}
    files = [file.resolve() for file in folder.rglob("*.py") if not _hidden(file.relative_to(folder))]
    for file in sorted(files, key=lambda file: (len(file.parts), str(file))):
        for name in _defined_names(file):
            defined.setdefault(name, []).append(file)
    peers = []
    for name in SELECTORS:
        if name in defined:
            file, *rest = defined[name]
            root = _import_root(file, folder)
            parts = file.relative_to(root).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            peers.append(Peer(name, module, file, root, tuple(rest)))
    return peers


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _defined_names(file: Path) -> list[str]:
    """By text: a module that cannot even be parsed is still found, so that its error is reported."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return [name for name in SELECTORS if re.search(rf"^def {name}\s*\(", text, re.MULTILINE)]


def _import_root(file: Path, folder: Path) -> Path:
    """The folder that holds the outermost package around a module; the module's own folder where it is in none."""
    top = folder.resolve()
    while (top / "__init__.py").is_file():  # the folder is itself inside a package
        top = top.parent
    around = [parent for parent in file.parents if parent.is_relative_to(top)]
    packages = [parent for parent in around if (parent / "__init__.py").is_file()]
    return packages[-1].parent if packages else file.parent  # a subfolder without __init__.py is still importable


@contextmanager
def importable(folder: Path, peers: list[Peer]) -> Iterator[None]:
    """The peers' roots on the import path; afterwards the path, and what is loaded of the folder, are as they were."""
    before, loaded = list(sys.path), set(sys.modules)
    roots = dict.fromkeys([str(peer.root) for peer in peers] + [str(folder.resolve())])
    sys.path[:0] = roots
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):
            if name not in loaded and _inside(module, folder):
                del sys.modules[name]


def _inside(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).resolve().is_relative_to(folder.resolve())


def load(peer: Peer) -> Callable[..., Any]:
    """The function, imported; inside `importable`.

    Raises:
        ImportError: where another module of that name is loaded already.
        Exception: whatever the import raises.
    """
    module = importlib.import_module(peer.module)
    found = Path(module.__file__ or "").resolve()
    if found != peer.file:
        raise ImportError(f"module {peer.module} is {found}, not the {peer.file.name} of the package")
    return getattr(module, peer.function)


def identity(peer: Peer, folder: Path) -> Row:
    """What tells one peer and one state of its code from another: names, and a digest of the folder's Python files."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder)
        if not _hidden(name):
            digest.update(str(name).encode() + b"\0" + file.read_bytes() + b"\0")
    return {
        "implementation": peer.implementation,
        "module": peer.module,
        "function": peer.function,
        "peer_version": None,
        "peer_digest": digest.hexdigest()[:12],
    }


def loaded_version(peer: Peer) -> str | None:
    """What the outermost package says of its version, once it is imported."""
    version = getattr(sys.modules.get(peer.implementation), "__version__", None)
    return None if version is None else str(version)


class Call:
    """A peer's function on given inputs, in its own layout.

    Args:
        peer: which function it is.
        function: what `load` found.
        inputs: copied once into contiguous `[B, L, H, D]`, the layout of both published signatures.
        config: the settings of the same method here.
    """

    def __init__(self, peer: Peer, function: Callable[..., Any], inputs: Inputs, config: Any) -> None:
        self._function = function
        self._tensors = [
            tensor.transpose(1, 2).contiguous().clone() for tensor in (inputs.query, inputs.key, inputs.value)
        ]
        self._takes_out = peer.function == "flash_prefill"
        self._out = torch.empty_like(self._tensors[0]) if self._takes_out else None
        self.settings: Mapping[str, Any] = (
            _flashprefill_settings(function, config) if self._takes_out else _flexprefill_settings(config)
        )

    def __call__(self) -> Any:
        """One call as a user makes it; what it returns."""
        if self._takes_out:
            return self._function(*self._tensors, self._out, **self.settings)
        return self._function(*self._tensors, **self.settings)

    def checked(self) -> tuple[Tensor, float | None]:
        """Output `[B, H, L, D]` of one call, and the computational ratio where the function returns one.

        Raises:
            ValueError: for an output of another shape, or one that is not finite.
            Exception: whatever the function raises.
        """
        ratio = None
        if self._out is not None:
            self._out.fill_(float("nan"))  # what it leaves out must not look right
            returned = self()
            out = returned if isinstance(returned, Tensor) else self._out
        else:
            returned = self._function(*self._tensors, **self.settings, return_computational_ratio=True)
            out = returned
            if isinstance(returned, (tuple, list)):
                out, ratio = returned[0], float(returned[1])
        expected = list(self._tensors[0].shape)
        if not isinstance(out, Tensor) or list(out.shape) != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"its output must have shape [B, L, H, D] = {expected}, got {got}")
        if not bool(out.isfinite().all()):
            raise ValueError("its output is not finite")
        return out.transpose(1, 2), ratio


def _flexprefill_settings(config: Any) -> dict[str, Any]:
    names = ("gamma", "tau", "min_budget", "max_budget", "block_size")
    return {name: getattr(config, name) for name in names}


def _flashprefill_settings(function: Callable[..., Any], config: Any) -> dict[str, Any]:
    """Published names of the same settings; min_budget, which is not in the paper, as its author set it, else 0."""
    default = inspect.signature(function).parameters["min_budget"].default
    return {
        "block_size": config.block_size,
        "attention_sink": config.sink_blocks,
        "window_size": config.window_blocks,
        "alpha": config.alpha,
        "last_n_block_full": config.last_full_blocks,
        "min_budget": 0 if default is inspect.Parameter.empty else default,
    }


def density_of_ratio(ratio: float, tokens: int, block_size: int) -> float:
    """Kept blocks / causal blocks from kept blocks / all blocks, of as many queries as keys."""
    blocks = -(-tokens // block_size)
    return ratio * 2 * blocks / (blocks + 1)
