"""Step 1: attention of the last queries, summed by key (`vertical`) and by offset (`slash`), never stored.

    P[i, j] = exp(s q_i . k_j - lse_i)          i: the last R <= B real queries
    vertical[j] = 1/R sum_i P[i, j]             slash[o] = 1/R sum_i P[i, x_i - o],  x_i the position of query i

Two passes over the keys: the first finds lse, the second sums. The queries fill the rows of a B x B tile from its end,
so that row i stands at position x_last - B + 1 + i. The diagonals of a tile are summed by a shear: in
G[i, d] = P[i, (i - d) mod B], rows i >= d of column d hold offset `base + d`, and rows i < d hold offset
`base + d - B`, which the next tile shares; each goes to a buffer of its own, and the two buffers are added.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.kernels.common import LENGTHS, denormal_exp, head_slices, on_device, real_range

TILES = 32  # key blocks per program


def launch_options(slices: int) -> dict[str, int]:
    """Warps and pipeline stages; several slices of the head dim leave no shared memory for a second stage."""
    return {"num_warps": 8, "num_stages": 2 if slices == 1 else 1}


@triton.jit
def _slice(source, real, dim, stride_l, index, D: tl.constexpr):
    """Rows `index` of a [L, D] matrix, columns `dim`; rows that are not real read as 0."""
    return tl.load(
        source + index.to(tl.int64)[:, None] * stride_l + dim[None, :],
        mask=real[:, None] & (dim < D)[None, :],
        other=0.0,
    )


@triton.jit
def _score_tile(
    query,
    key,
    q_stride,
    k_stride,
    q_index,
    k_position,
    q_real,
    k_real,
    visible,
    scale,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s q . k of a [BLOCK, BLOCK] tile, -inf where masked."""
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for part in tl.static_range(SLICES):
        dim = part * SLICE + tl.arange(0, SLICE)
        q = _slice(query, q_real, dim, q_stride, q_index, D)  # [BLOCK, SLICE]
        k = _slice(key, k_real, dim, k_stride, k_position, D)  # [BLOCK, SLICE]
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    return tl.where(visible, scores * scale, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _lse_kernel(
    query,
    key,
    ranges,
    maxima,  # [B * Hq, splits, BLOCK] fp32
    sums,  # [B * Hq, splits, BLOCK] fp32
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    heads,
    groups,
    offset,
    scale,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Running maximum and sum of exponentials of each row over this program's key blocks."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    lane = tl.arange(0, BLOCK)
    q_position = end - BLOCK + lane
    q_real = q_position >= tl.maximum(start, offset)
    query += batch * q_stride_b + head * q_stride_h
    key += batch * k_stride_b + (head // groups) * k_stride_h
    running = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.maximum(split * TILES, start // BLOCK)
    last = tl.minimum(split * TILES + TILES, (end + BLOCK - 1) // BLOCK)
    for block in range(first, last):
        k_position = block * BLOCK + lane
        k_real = (k_position >= start) & (k_position < end)
        visible = q_real[:, None] & k_real[None, :] & (k_position[None, :] <= q_position[:, None])
        scores = _score_tile(
            query, key, q_stride_l, k_stride_l, q_position - offset, k_position, q_real, k_real, visible, scale,
            D, SLICE, SLICES, BLOCK,
        )  # fmt: skip
        highest = tl.maximum(running, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(running - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        running = highest
    target = (row * tl.num_programs(0) + split) * BLOCK + lane
    tl.store(maxima + target, running)
    tl.store(sums + target, total)


@triton.jit(do_not_specialize=LENGTHS)
def _sums_kernel(
    query,
    key,
    ranges,
    maxima,
    sums,
    vertical,  # [B * Hq, kv_len] fp32
    slash_upper,  # [B * Hq, kv_len] fp32, by offset
    slash_lower,  # [B * Hq, kv_len] fp32, by offset
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    heads,
    groups,
    kv_len,
    offset,
    scale,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Column and diagonal sums of P over this program's key blocks."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    lane = tl.arange(0, BLOCK)
    q_position = end - BLOCK + lane
    q_real = q_position >= tl.maximum(start, offset)
    rows = tl.maximum(tl.sum(q_real.to(tl.float32), 0), 1.0)
    query += batch * q_stride_b + head * q_stride_h
    key += batch * k_stride_b + (head // groups) * k_stride_h
    vertical += row * kv_len
    slash_upper += row * kv_len
    slash_lower += row * kv_len

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(tl.num_programs(0)):
        source = (row * tl.num_programs(0) + part) * BLOCK + lane
        running = tl.load(maxima + source)
        higher = tl.maximum(highest, running)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.load(sums + source) * tl.exp(running - base)
        highest = higher
    weight = tl.where(q_real, 1.0 / (tl.maximum(total, 1e-30) * rows), 0.0)
    base = tl.where(q_real, highest, 0.0)

    first = tl.maximum(split * TILES, start // BLOCK)
    last = tl.minimum(split * TILES + TILES, (end + BLOCK - 1) // BLOCK)
    column = (lane[:, None] - lane[None, :]) & (BLOCK - 1)  # (i - d) mod BLOCK
    upper = lane[:, None] >= lane[None, :]
    for block in range(first, last):
        k_position = block * BLOCK + lane
        k_real = (k_position >= start) & (k_position < end)
        visible = q_real[:, None] & k_real[None, :] & (k_position[None, :] <= q_position[:, None])
        scores = _score_tile(
            query, key, q_stride_l, k_stride_l, q_position - offset, k_position, q_real, k_real, visible, scale,
            D, SLICE, SLICES, BLOCK,
        )  # fmt: skip
        probability = denormal_exp(scores - base[:, None]) * weight[:, None]  # [BLOCK, BLOCK]
        tl.store(vertical + k_position, tl.sum(probability, 0), mask=k_position < kv_len)
        sheared = tl.gather(probability, column, 1)
        above = end - BLOCK - block * BLOCK + lane  # offsets of rows i >= d
        below = above - BLOCK
        above_sum = tl.sum(tl.where(upper, sheared, 0.0), 0)
        below_sum = tl.sum(tl.where(upper, 0.0, sheared), 0)
        tl.store(slash_upper + above, above_sum, mask=(above >= 0) & (above < kv_len))
        tl.store(slash_lower + below, below_sum, mask=(below >= 0) & (below < kv_len))


def last_query_scores(
    query: Tensor, key: Tensor, ranges: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`vertical` by key position and `slash` by offset, both fp32 `[B * Hq, Lkv]` and 0 outside the real range."""
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    splits = cdiv(cdiv(kv_len, block_size), TILES)
    partial = torch.empty(2, batch * heads, splits, block_size, dtype=torch.float32, device=query.device)
    out = torch.zeros(3, batch * heads, kv_len, dtype=torch.float32, device=query.device)
    width, count = head_slices(dim, query.dtype)
    constants = {"D": dim, "SLICE": width, "SLICES": count, "BLOCK": block_size, "TILES": TILES}
    launch = launch_options(count)
    strides = (*query.stride()[:3], *key.stride()[:3])
    grid = (splits, batch * heads)
    groups = heads // kv_heads
    offset = kv_len - q_len
    with on_device(query):
        _lse_kernel[grid](
            query, key, ranges, partial[0], partial[1], *strides, heads, groups, offset, scale, **constants, **launch
        )
        _sums_kernel[grid](
            query, key, ranges, partial[0], partial[1], out[0], out[1], out[2], *strides, heads, groups, kv_len, offset,
            scale, **constants, **launch,
        )  # fmt: skip
    return out[0], out[1] + out[2]
