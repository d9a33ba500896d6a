"""Bytes that a run needs at least, and bytes that are free: too little memory is told before a model is loaded."""

from __future__ import annotations

import json
import math
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexprefill_fa.grid import cdiv
from flexprefill_fa.index_lists import PARTIAL
from flexprefill_fa.tools.fidelity.divergence import PIECE_COPIES, piece_positions
from flexprefill_fa.tools.loading import UsageError

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_BLOCK_SIZE = 128


@dataclass(frozen=True)
class Estimate:
    """Bytes; a lower bound, because what a kernel takes for itself is not known.

    Attributes:
        weights: of the model.
        activations: of one layer at the longest length, block lists included, and hidden states that are kept.
        logits: of the positions that are compared at once.
    """

    weights: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together; activations and logits are not there at the same time."""
        return self.weights + max(self.activations, self.logits)

    def check(self, free: int, where: str) -> None:
        """Raises `UsageError` where more is needed than is free."""
        if self.total > free:
            raise UsageError(f"too little memory on {where}: {self.text()}, {_size(free)} are free")

    def text(self) -> str:
        """For people."""
        return (
            f"at least {_size(self.total)} are needed (weights {_size(self.weights)}, activations "
            f"{_size(self.activations)}, logits {_size(self.logits)})"
        )


def estimate(
    folder: str | Path,
    config: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    length: int,
    texts: int,
    chunk: int | None = None,
) -> Estimate:
    """What a run needs.

    Args:
        folder: of the model.
        config: of the model.
        dtype: of the weights, None for the checkpoint's.
        device: where it runs.
        length: the longest, in tokens.
        texts: how many dense readings are kept, on the CPU.
        chunk: tokens that are read at once, None for all.
    """
    item = dtype.itemsize if dtype is not None else getattr(config.dtype, "itemsize", 4)
    text = config.get_text_config(decoder=True)
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 4 * hidden)
    rows = min(length, chunk or length)
    attention = 2 * heads * head_dim + 2 * kv_heads * head_dim  # queries, output; keys, values
    layer = rows * (2 * hidden + max(attention, 2 * inner))
    cache = 2 * kv_heads * head_dim * length * text.num_hidden_layers if rows < length else 0
    kept = length * hidden * (1 + texts if device.type == "cpu" else 1)
    lists = 4 * heads * cdiv(rows, _BLOCK_SIZE) * (PARTIAL + cdiv(length, _BLOCK_SIZE))
    logits = 4 * PIECE_COPIES * piece_positions(text.vocab_size, device) * text.vocab_size
    return Estimate(weight_bytes(folder, dtype), item * (layer + cache + kept) + lists, logits)


def weight_bytes(folder: str | Path, dtype: torch.dtype | None) -> int:
    """Bytes of a model's weights once they are loaded.

    Args:
        folder: of the model.
        dtype: what they are loaded as, None for the checkpoint's.

    Raises:
        UsageError: for a file that is not what its name says.
    """
    total = 0
    for file in _weight_files(Path(folder)):
        for shape, stored in _tensors(file):
            total += math.prod(shape) * (_ITEM_BYTES.get(stored, 1) if dtype is None else dtype.itemsize)
    return total or sum(file.stat().st_size for file in Path(folder).glob("*.bin"))


def _weight_files(folder: Path) -> list[Path]:
    """The files of safetensors that are loaded: some folders hold the same weights twice, under other names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot load the model in {folder}: {index.name} is not an index of weights") from error


def _tensors(file: Path) -> list[tuple[list[int], str]]:
    """Shape and dtype of each tensor in a file of safetensors: a length of 8 bytes, then that much JSON."""
    try:
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            header = json.loads(data.read(min(length, 2**30)))
        return [(entry["shape"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UsageError(f"cannot load the model in {file.parent}: {file.name} is not a file of safetensors") from error


def free_bytes(device: torch.device, spread: bool = False) -> int:
    """Bytes that are free on a device; on all GPUs together for a model that is spread over them."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if spread else [device]
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    free = [_available()]
    group = Path("/sys/fs/cgroup")  # of a container
    with suppress(OSError, ValueError):  # no limit
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB ({number:,} bytes)"
