"""Released implementations of the same methods: where each one's function is, and how it is called."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workloads import Inputs
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.rows import Row


@dataclass(frozen=True)
class Call:
    """A peer's function on given inputs.

    Attributes:
        settings: what it is called with besides the tensors.
        run: one call as a user makes it.
        check: one call; its output `[B, L, H, D]`, and kept blocks / all blocks where the function tells it.
    """

    settings: dict[str, Any]
    run: Callable[[], object]
    check: Callable[[], tuple[Any, float | None]]


def _flex_prefill(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    if config.variant != "published":  # the function has no name for it
        raise ValueError(f"it selects the variant 'published', got settings of the variant {config.variant!r}")
    settings = {name: getattr(config, name) for name in ("gamma", "tau", "min_budget", "max_budget", "block_size")}
    run = partial(function, query, key, value, **settings)
    return Call(settings, run, partial(run, return_computational_ratio=True))


def _flash_prefill(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    out = torch.empty_like(query)
    settings = {"block_size": config.block_size, "attention_sink": config.sink_blocks, "alpha": config.alpha}
    settings |= {"window_size": config.window_blocks, "last_n_block_full": config.last_full_blocks}
    settings["min_budget"] = 0  # blocks; the paper has no such setting
    run = partial(function, query, key, value, out, **settings)

    def check() -> tuple[Tensor, None]:
        out.fill_(float("nan"))  # what it leaves out must not look right
        run()
        return out, None

    return Call(settings, run, check)


@dataclass(frozen=True)
class Peer:
    """A released function.

    Attributes:
        name: of the implementation.
        selector: the same method here.
        module: dotted name, from the folder of its repository.
        function: its name in there.
        adapter: function, queries, keys and values `[B, L, H, D]`, settings of the selector -> its call.
    """

    name: str
    selector: str
    module: str
    function: str
    adapter: Callable[[Callable[..., Any], Tensor, Tensor, Tensor, Any], Call]

    @property
    def file(self) -> Path:
        """The module's, in the folder."""
        return Path(*self.module.split(".")).with_suffix(".py")

    def load(self, folder: Path) -> Callable[..., Any]:
        """The function, imported; inside `foreign_code`.

        Raises:
            ImportError: where another module of that name is loaded already.
            Exception: whatever the import raises.
        """
        module = importlib.import_module(self.module)
        found = Path(module.__file__ or "").resolve()
        if found != (folder / self.file).resolve():
            raise ImportError(f"module {self.module} is {found}, not the one in {folder}")
        return getattr(module, self.function)

    def call(self, folder: Path, inputs: Inputs, config: Any) -> Call:
        """Its call on inputs, copied once into its contiguous `[B, L, H, D]`; inside `foreign_code`.

        Raises:
            ValueError: for a variant that it does not select.
            Exception: whatever the import raises.
        """
        function, tensors = self.load(folder), (inputs.query, inputs.key, inputs.value)
        query, key, value = (tensor.transpose(1, 2).contiguous().clone() for tensor in tensors)
        return self.adapter(function, query, key, value, config)

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


RELEASED = (
    Peer(
        "FlexPrefill",
        "flexprefill",
        "flex_prefill.ops.flex_prefill_attention",
        "flex_prefill_attention",
        _flex_prefill,
    ),
    Peer("FlashPrefill", "flashprefill", "ops.flashprefill_native_forward", "flash_prefill", _flash_prefill),
)
"""github.com/bytedance/FlexPrefill and github.com/qhfan/FlashPrefill."""


def peers_in(folder: Path, selectors: Sequence[str]) -> list[Peer]:
    """The peers of these selectors whose repository a folder is; nothing is imported.

    Raises:
        UsageError: where there is none, saying what was looked for.
    """
    wanted = [peer for peer in RELEASED if peer.selector in selectors]
    if not wanted:
        known = " and ".join(peer.selector for peer in RELEASED)
        raise UsageError(f"package needs selectors of {known}, got {', '.join(selectors)}")
    found = [peer for peer in wanted if (folder / peer.file).is_file()]
    if not found:
        files = " or ".join(f"{peer.file} of {peer.name}" for peer in wanted)
        raise UsageError(f"package must be a folder that holds {files}, got {folder}")
    return found


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
