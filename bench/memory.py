"""How much memory a length needs, and how much there is."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.check import SAMPLED_ROWS

_OUTPUTS = 4  # of dense, of sparse, one more while a graph holds its own, and what a kernel makes beside it


def needed_bytes(
    length: int, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """An estimate of what measuring one length takes at once, inputs included, on the safe side."""
    query = batch * heads * length * head_dim * dtype.itemsize
    key = batch * kv_heads * length * head_dim * dtype.itemsize
    blocks = -(-length // 128)
    lists = 6 * 4 * batch * heads * blocks * blocks  # two selections of two int32 lists each, and block scores
    groups = heads // kv_heads
    check = 8 * length * (2 * head_dim + 4 * groups * SAMPLED_ROWS)  # fp64 keys and values, scores of a kv group
    needed = query + 2 * key + _OUTPUTS * query + lists + check
    if device.type == "cpu":  # the plain selection: fp32 scores of 128 queries; queries, and keys for every head
        needed += heads * length * 4 * (5 * 128 + 2 * head_dim)
    return needed


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on the device: the GPU's, or the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")


def shortage(needed: int, free: int) -> str | None:
    """One line with both numbers where memory is short, else None."""
    if needed <= free:
        return None
    return f"it needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
