"""Functions of other implementations, found by name in a folder and called with their own signatures."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workloads import Inputs
from flexprefill_fa.tools.rows import Row

SELECTORS = {"flex_prefill_attention": "flexprefill", "flash_prefill": "flashprefill"}
"""The published functions that can be called, and the selector whose method each one is."""


@dataclass(frozen=True)
class Peer:
    """A function in a folder, not imported yet.

    Attributes:
        function: its name, a key of `SELECTORS`.
        module: dotted name of the module that defines it. file: that module's file.
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


def find_peers(folder: Path, modules: Sequence[str] = ()) -> list[Peer]:
    """The published functions that modules under a folder define, each once; nothing is imported.

    Those inside an `if` or a `try` count, those of classes and other functions do not. Of several modules that define
    one name, those in a package come before loose files and the outermost before deeper ones, the first by name among
    equals. The folder may be a package itself, hold packages, or be a checkout that does.

    Args:
        folder: where to look.
        modules: dotted names of the only modules to look at; else all but tests.
    """
    found: dict[str, list[Peer]] = {function: [] for function in SELECTORS}
    for name in python_files(folder):
        test = name.match("test_*.py") or name.match("*_test.py") or {"test", "tests"} & set(name.parts[:-1])
        if modules or not test:
            for function in _defined_names(folder / name):
                found[function].append(_peer(function, (folder / name).resolve(), folder))
    peers = []
    for same in found.values():
        same = [peer for peer in same if not modules or peer.module in modules]
        same.sort(key=lambda peer: (peer.root == peer.file.parent, len(peer.file.parts), str(peer.file)))
        if same:
            peers.append(dataclasses.replace(same[0], also=tuple(peer.file for peer in same[1:])))
    return peers


def python_files(folder: Path) -> list[Path]:
    """The Python files under a folder, sorted, by their paths in it; neither hidden ones nor dangling links."""
    names = [file.relative_to(folder) for file in folder.rglob("*.py") if file.is_file()]
    return sorted(name for name in names if not any(part.startswith(".") for part in name.parts))


def _defined_names(file: Path) -> list[str]:
    """The published functions that a file defines; by text where it is no Python, so that its error is reported."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if not any(name in text for name in SELECTORS):
        return []
    try:
        nodes: list[ast.AST] = [ast.parse(text)]
    except (SyntaxError, ValueError):  # the latter for null bytes
        return [name for name in SELECTORS if re.search(rf"^def {name}\b", text, re.MULTILINE)]
    defined = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, (ast.Module, ast.If, ast.Try, ast.ExceptHandler)):
            nodes += ast.iter_child_nodes(node)
    return [name for name in SELECTORS if name in defined]


def _peer(function: str, file: Path, folder: Path) -> Peer:
    """Its root is the folder that holds the outermost package around the module, or the module where it is in none."""
    top = folder.resolve()
    while (top / "__init__.py").is_file():  # the folder is itself inside a package
        top = top.parent
    around = [parent for parent in file.parents if parent.is_relative_to(top)]
    packages = [parent for parent in around if (parent / "__init__.py").is_file()]
    root = packages[-1].parent if packages else file.parent  # a subfolder without __init__.py is still importable
    parts = file.relative_to(root).with_suffix("").parts
    return Peer(function, ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file, root)


@contextmanager
def foreign_code(peer: Peer) -> Iterator[None]:
    """For imports and calls of a peer: its root is first on the import path, and what it prints goes to stderr."""
    root = str(peer.root)
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if root in sys.path:  # unless the peer took it away itself
            sys.path.remove(root)


def load(peer: Peer) -> Callable[..., Any]:
    """The function, imported; inside `foreign_code`.

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
    for name in python_files(folder):
        digest.update(str(name).encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return {
        "implementation": peer.implementation,
        "module": peer.module,
        "function": peer.function,
        "peer_version": None,
        "peer_digest": digest.hexdigest()[:12],
    }


class Call:
    """A peer's function on given inputs, in its own layout; inside `foreign_code`.

    Args:
        peer: which function it is.
        inputs: copied once into contiguous `[B, L, H, D]`, the layout of both published signatures.
        config: the settings of the same method here.

    Raises:
        TypeError: naming the settings that the function does not take.
        ValueError: for a variant that it does not select.
        Exception: whatever the import raises.
    """

    def __init__(self, peer: Peer, inputs: Inputs, config: Any) -> None:
        self._function = load(peer)
        tensors = (inputs.query, inputs.key, inputs.value)
        self._tensors = [tensor.transpose(1, 2).contiguous().clone() for tensor in tensors]
        self._out = torch.empty_like(self._tensors[0]) if peer.function == "flash_prefill" else None
        parameters = inspect.signature(self._function).parameters
        settings = _SETTINGS[peer.function](config, parameters)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.settings = {name: settings[name] for name in settings if takes_any or name in parameters}
        lacking = [name for name in settings if name not in self.settings and settings[name] is not None]
        if lacking:
            raise TypeError(f"its signature has no {', '.join(lacking)}")
        self._ratio = {"return_computational_ratio": True} if "return_computational_ratio" in parameters else {}

    def __call__(self, **more: Any) -> Any:
        """One call as a user makes it; what it returns."""
        out = () if self._out is None else (self._out,)
        return self._function(*self._tensors, *out, **self.settings, **more)

    def checked(self) -> tuple[Tensor, float | None]:
        """Output `[B, H, L, D]` of one call, and the computational ratio where the function returns one.

        Raises:
            ValueError: for an output of another shape, or one that is not finite.
            Exception: whatever the function raises.
        """
        if self._out is not None:
            self._out.fill_(float("nan"))  # what it leaves out must not look right
        out, ratio = self(**({} if self._out is not None else self._ratio)), None
        if self._out is not None:
            out = out if isinstance(out, Tensor) else self._out
        elif isinstance(out, (tuple, list)):
            out, ratio = out[0], float(out[1])
        expected = list(self._tensors[0].shape)
        if not isinstance(out, Tensor) or list(out.shape) != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"its output must have shape [B, L, H, D] = {expected}, got {got}")
        if not bool(out.isfinite().all()):
            raise ValueError("its output is not finite")
        return out.transpose(1, 2), ratio


def _flexprefill_settings(config: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    if config.variant != "published":  # the function has no name for it
        raise ValueError(f"it selects the variant 'published', got settings of the variant {config.variant!r}")
    return {name: getattr(config, name) for name in ("gamma", "tau", "min_budget", "max_budget", "block_size")}


def _flashprefill_settings(config: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Published names of the same settings; min_budget, which is not in the paper, as its author set it, else 0."""
    settings = {"block_size": config.block_size, "attention_sink": config.sink_blocks, "alpha": config.alpha}
    settings |= {"window_size": config.window_blocks, "last_n_block_full": config.last_full_blocks}
    if "min_budget" in parameters:
        default = parameters["min_budget"].default
        settings["min_budget"] = 0 if default is inspect.Parameter.empty else default
    return settings


_SETTINGS = {"flex_prefill_attention": _flexprefill_settings, "flash_prefill": _flashprefill_settings}


def density_of_ratio(ratio: float, tokens: int, block_size: int) -> float:
    """Kept blocks / causal blocks from kept blocks / all blocks, of as many queries as keys, to five digits.

    Raises:
        ValueError: for a density that cannot be.
    """
    blocks = -(-tokens // block_size)
    density = round(ratio * 2 * blocks / (blocks + 1), 5)
    if not 0 < density <= 1:
        raise ValueError(f"its ratio {ratio:g} means a density of {density:g}, which must be in (0, 1]")
    return density
