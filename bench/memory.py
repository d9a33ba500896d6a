"""How much memory a length needs, and how much there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.check import SAMPLED_ROWS
from bench.shapes import head_dim

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
    if device.type == "cpu":  # the plain reference selects: fp32 scores of 128 queries, keys for every head
        needed += heads * length * 4 * (5 * 128 + 2 * head_dim)
    return needed


def prefill_bytes(config: Any, length: int, chunk: int | None, dtype: torch.dtype, ranks: int = 1) -> int:
    """An estimate of what a model's prefill of `length` tokens takes on each rank, weights and cache included.

    Args:
        config: transformers config of a dense decoder.
        length: tokens of the prompt.
        chunk: tokens of it at a time, None for all.
        dtype: of weights and activations.
        ranks: that share the model.
    """
    hidden, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = 3 * hidden * inner + 2 * hidden * dim * (heads + kv_heads)
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    weights = config.num_hidden_layers * layer // ranks + tables
    cache = 2 * config.num_hidden_layers * kv_heads * dim * length // ranks
    at_once = length if chunk is None else min(chunk, length)
    feed_forward = 3 * inner // ranks
    attention = (4 * heads + 4 * kv_heads) * dim // ranks
    activations = at_once * (5 * hidden + max(feed_forward, attention)) + 2 * cache // config.num_hidden_layers
    blocks = -(-length // 128) * -(-at_once // 128)
    lists = 6 * 4 * (heads // ranks) * blocks  # a selection, its stand-in, and block scores
    return (weights + cache + activations) * dtype.itemsize + lists


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
