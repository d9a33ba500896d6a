"""Between the passes over the keys and the choice: add up the parts, and sum everything per block."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range
from flexprefill_fa.kernels.last_query import LastQueryScores


class HeadScores(NamedTuple):
    """Scores of each head, 0 outside the real range."""

    tokens: Tensor  # [2, B * Hq, Lkv] fp32: `vertical` by key position, `slash` by offset
    columns: Tensor  # [B * Hq, nk] fp32: vertical per block
    diagonals: Tensor  # [B * Hq, nk] fp32: slash per group of B offsets, counted from the far end, as released
    logits: Tensor  # [B * Hq, nk] fp32: s mean(last queries) . mean(k_J)


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    vertical,  # [steps, B * Hq, kv_len]
    slash,  # [B * Hq, kv_len]
    carry,  # [splits, B * Hq, KEYS]
    mean_query,  # [B * Hq, D]
    mean_key,  # [B, Hkv, blocks, D]
    ranges,
    tokens,  # [2, B * Hq, kv_len], out
    columns,  # [B * Hq, blocks], out
    diagonals,  # [B * Hq, blocks], out
    logits,  # [B * Hq, blocks], out
    heads,
    groups,
    kv_len,
    blocks,
    tiles,
    all_rows,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per block and head, and one more for the offsets that the grouping from the far end leaves over."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    lane = tl.arange(0, BLOCK)
    token = block * BLOCK + lane
    weight = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(BLOCK // ROWS):
        written = (token >= start) & (token < end) & (token < end - BLOCK + ROWS * step + KEYS)
        source = vertical + (step * all_rows + row) * kv_len + token
        weight += tl.load(source, mask=written, other=0.0)
    tl.store(tokens + row * kv_len + token, weight, mask=token < kv_len)

    n = end - start // BLOCK * BLOCK
    shift = (n + BLOCK - 1) // BLOCK * BLOCK - n
    offset = block * BLOCK - shift + lane
    real = (offset >= 0) & (offset < end - start)
    value = tl.load(slash + row * kv_len + offset, mask=real, other=0.0)
    tile = (offset + KEYS - 1) // KEYS  # the tile whose band holds the offset, at place `c` of it
    c = tile * KEYS - offset
    left = real & (tile > 0) & (tile % tiles == 0)  # the split before left a part of this band
    value += tl.load(carry + ((tile // tiles - 1) * all_rows + row) * KEYS + c, mask=left, other=0.0)
    tl.store(tokens + (all_rows + row) * kv_len + offset, value, mask=(offset >= 0) & (offset < kv_len))

    if block < blocks:
        tl.store(columns + row * blocks + block, tl.sum(weight, 0))
        tl.store(diagonals + row * blocks + block, tl.sum(value, 0))
        dim = tl.arange(0, BLOCK_D)
        mean = tl.load(mean_query + row * D + dim, mask=dim < D, other=0.0)
        mean_key += ((batch * (heads // groups) + head // groups) * blocks + block) * D
        pooled = tl.load(mean_key + dim, mask=dim < D, other=0.0)
        tl.store(logits + row * blocks + block, tl.sum(mean * pooled, 0) * scale)


def merge_parts(
    parts: LastQueryScores, mean_key: Tensor, ranges: Tensor, *, heads: int, block_size: int, scale: float
) -> HeadScores:
    """Token and block scores of each head; mean_key fp32 `[B, Hkv, nk, D]`."""
    rows, kv_len = parts.slash.shape
    kv_heads, blocks, dim = mean_key.shape[1:]
    tokens = torch.empty(2, rows, kv_len, dtype=torch.float32, device=mean_key.device)
    per_block = torch.empty(3, rows, blocks, dtype=torch.float32, device=mean_key.device)
    with on_device(mean_key):
        _merge_kernel[(blocks + 1, rows)](
            parts.vertical, parts.slash, parts.carry, parts.mean_query, mean_key, ranges, tokens, per_block[0],
            per_block[1], per_block[2], heads, heads // kv_heads, kv_len, blocks, parts.tiles, rows, scale, D=dim,
            BLOCK_D=next_power_of_2(dim), BLOCK=block_size, KEYS=parts.carry.shape[2],
            ROWS=parts.group_rows, num_warps=4,
        )  # fmt: skip
    return HeadScores(tokens, per_block[0], per_block[1], per_block[2])
