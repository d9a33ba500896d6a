"""How much memory a length needs, and how much there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.check import SAMPLED_ROWS
from bench.shapes import head_dim, parameter_count

_OUTPUTS = 4  # of dense, of sparse, one more while a graph holds its own, and what a kernel makes beside it
_TOKEN = 5 * 8  # bytes: int64 ids, twice, positions, and the mask, twice
_WORKSPACE = 32 * 2**20  # of cuBLAS on Hopper, less on other GPUs


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
    if device.type == "cpu":
        needed += _reference_bytes(heads, length, head_dim)
    return needed


def prefill_bytes(
    config: Any, length: int, chunk: int | None, dtype: torch.dtype, device: torch.device, ranks: int = 1
) -> int:
    """An estimate of what a model's prefill of `length` tokens takes on each rank, weights and cache included.

    Args:
        config: transformers config of a dense decoder.
        length: tokens of the prompt.
        chunk: tokens of it at a time, None for all.
        dtype: of weights and activations.
        device: of the model.
        ranks: that share the model.
    """
    hidden, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    heads, kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
    table = config.vocab_size * hidden  # whole on each rank, while an output head of its own is shared out
    weights = table + (parameter_count(config) - table) // ranks
    keys = kv_heads * dim * length  # of one layer
    cache = 2 * config.num_hidden_layers * keys

    at_once = length if chunk is None else min(chunk, length)
    # Alive in every layer: the embeddings, the layer's input and its norm's output, and the rotary tables.
    around = at_once * (3 * hidden + 2 * dim)
    # The sum after attention; the activated gate, the other half, and their product.
    feed_forward = at_once * (hidden + 3 * inner // ranks) * dtype.itemsize
    # Queries beside three others, rotated or put out; keys and values; a layer's keys copied as its cache grows.
    attention = (at_once * (4 * heads + 2 * kv_heads) * dim + keys) * dtype.itemsize
    blocks, blocks_at_once = -(-length // 128), -(-at_once // 128)
    attention += 6 * 4 * heads * blocks * blocks_at_once  # a selection, its stand-in, and block scores
    drawn = 4 * heads * blocks * blocks  # the stand-in's blocks of every chunk, at most
    if device.type == "cpu":
        attention += _reference_bytes(heads, length, dim)
    steady = (weights + cache + around) * dtype.itemsize + drawn + _TOKEN * length
    return steady + max(feed_forward, attention) + (_WORKSPACE if device.type == "cuda" else 0)


def _reference_bytes(heads: int, length: int, head_dim: int) -> int:
    """Of the plain selection on the CPU: fp32 scores of 128 queries; queries, and keys for every head."""
    return heads * length * 4 * (5 * 128 + 2 * head_dim)


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
