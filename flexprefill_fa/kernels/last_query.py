"""Attention of the last queries, summed by key (`vertical`) and by offset (`slash`), never stored.

    P[i, k] = exp(s q_i . k_k - lse_i)          i: the last R <= B real queries, the last one at position end - 1
    vertical[k] = 1/R sum_i P[i, k]             slash[o] = 1/R sum_i P[i, x_i - o],  x_i the position of query i

Two passes over the keys: the first finds lse, the second sums. Diagonals are the hard part: a tile's offsets differ
from row to row, and shearing every tile through shared memory costs more than computing it. So the second pass cuts
the B query rows into groups of ROWS, and moves the key tile of group g by g * ROWS keys: the offset of an item,

    x - k = KEYS * u + b - j                    tile u (counted from the end), row b of its group, key j of the tile,

is then the same in every group. The groups are added up first, and one shear serves them all; the rows of HEADS heads
that share their keys fill the tile meanwhile. With c = (j - b) mod KEYS an item goes to offset KEYS * u - c, or, where
j < b, to KEYS * (u + 1) - c, which the next tile shares: that part is carried over to it.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import cdiv, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, head_slices, on_device, programs_at_once, real_range

MAX_SPLITS = 64
KEYS = 64  # keys of a tile of the second pass


@dataclass(frozen=True)
class LastQueryScores:
    """What the two passes leave in memory; `merge_parts` in merge.py adds the parts up."""

    vertical: Tensor  # [steps, B * Hq, Lkv] fp32: part g ends KEYS after the group's first position
    slash: Tensor  # [B * Hq, Lkv] fp32, by offset
    carry: Tensor  # [splits, B * Hq, KEYS] fp32: what a split's last tile leaves to the next split's first
    mean_query: Tensor  # [B * Hq, D] fp32, the mean of the last queries
    group_rows: int  # ROWS
    tiles: int  # tiles per split


@triton.jit
def _slice(source, real, dim, stride_l, index, D: tl.constexpr):
    """Rows `index` of a [L, D] matrix, columns `dim`; rows that are not real read as 0."""
    return tl.load(
        source + index.to(tl.int64)[:, None] * stride_l + dim[None, :],
        mask=real[:, None] & (dim < D)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=LENGTHS)
def _lse_kernel(
    query,
    key,
    ranges,
    maxima,  # [B * Hq, splits, BLOCK] fp32, out, in units of log 2
    sums,  # [B * Hq, splits, BLOCK] fp32, out
    mean_query,  # [B * Hq, D] fp32, out
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    heads,
    groups,
    offset,
    tiles,
    scale,  # times log2(e)
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
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
    if split == 0:
        rows = tl.maximum(tl.sum(q_real.to(tl.float32), 0), 1.0)
        for part in tl.static_range(SLICES):
            dim = part * SLICE + tl.arange(0, SLICE)
            queries = _slice(query, q_real, dim, q_stride_l, q_position - offset, D).to(tl.float32)
            tl.store(mean_query + row * D + dim, tl.sum(queries, 0) / rows, mask=dim < D)
    running = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.maximum(split * tiles, start // BLOCK)
    last = tl.minimum(split * tiles + tiles, (end + BLOCK - 1) // BLOCK)
    for block in range(first, last):
        k_position = block * BLOCK + lane
        k_real = (k_position >= start) & (k_position < end)
        scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        for part in tl.static_range(SLICES):
            dim = part * SLICE + tl.arange(0, SLICE)
            q = _slice(query, q_real, dim, q_stride_l, q_position - offset, D)  # [BLOCK, SLICE]
            k = _slice(key, k_real, dim, k_stride_l, k_position, D)  # [BLOCK, SLICE]
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        scores *= scale
        if (block * BLOCK + 2 * BLOCK > end) | (block * BLOCK < start):  # some pair is masked
            visible = k_real[None, :] & (k_position[None, :] <= q_position[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(running, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2(running - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        running = highest
    target = (row * tl.num_programs(0) + split) * BLOCK + lane
    tl.store(maxima + target, running)
    tl.store(sums + target, total)


@triton.jit(do_not_specialize=LENGTHS)
def _combine_kernel(
    ranges,
    maxima,
    sums,
    lse,  # [B * Hq, BLOCK] fp32, out: log2 of R sum exp, infinite for rows without a real query
    heads,
    offset,
    splits,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the splits of a row."""
    row = tl.program_id(0).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    lane = tl.arange(0, BLOCK)
    q_real = end - BLOCK + lane >= tl.maximum(start, offset)
    rows = tl.sum(q_real.to(tl.float32), 0)
    split = tl.arange(0, SPLITS)[:, None]
    source = (row * splits + split) * BLOCK + lane[None, :]  # [SPLITS, BLOCK]
    running = tl.load(maxima + source, mask=split < splits, other=float("-inf"))
    highest = tl.max(running, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.load(sums + source, mask=split < splits, other=0.0) * tl.exp2(running - base[None, :]), 0)
    found = base + tl.log2(tl.maximum(total, 1e-30) * tl.maximum(rows, 1.0))
    tl.store(lse + row * BLOCK + lane, tl.where(q_real, found, float("inf")))


@triton.jit(do_not_specialize=LENGTHS)
def _sums_kernel(
    query,
    key,
    ranges,
    lse,  # [B * Hq, BLOCK] fp32
    vertical,  # [STEPS, B * Hq, kv_len] fp32, out
    slash,  # [B * Hq, kv_len] fp32, out, by offset
    carry,  # [splits, B * Hq, KEYS] fp32, out
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
    all_rows,
    tiles,
    scale,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Column and diagonal sums of P over this program's tiles, for HEADS heads of one kv group."""
    STEPS: tl.constexpr = BLOCK // ROWS
    N: tl.constexpr = HEADS * ROWS
    split = tl.program_id(0)
    parts = (groups + HEADS - 1) // HEADS  # programs per kv head
    kv_row = (tl.program_id(1) // parts).to(tl.int64)
    kv_heads = heads // groups
    batch, kv_head = kv_row // kv_heads, kv_row % kv_heads
    start, end = real_range(ranges, batch)
    in_group = tl.program_id(1) % parts * HEADS
    column = tl.arange(0, N)
    b = column % ROWS
    lane_head = in_group + column // ROWS
    head_real = lane_head < groups
    row = batch * heads + kv_head * groups + lane_head  # [N]
    j = tl.arange(0, KEYS)
    q_source = query + batch * q_stride_b + (kv_head * groups + lane_head) * q_stride_h  # [N]
    key += batch * k_stride_b + kv_head * k_stride_h

    out_head = in_group + tl.arange(0, HEADS)
    out_row = batch * heads + kv_head * groups + out_head  # [HEADS]
    out_real = out_head < groups
    shear = (j[:, None] + b[None, :]) & (KEYS - 1)
    carried = j[:, None] + b[None, :] >= KEYS
    total = tl.zeros([KEYS, N], tl.float32)
    left = tl.zeros([KEYS, HEADS], tl.float32)
    last_tile = tl.minimum(split * tiles + tiles, (end - start - ROWS + KEYS - 1) // KEYS + 2)
    for index in range(split * tiles * STEPS, last_tile * STEPS):  # one loop over tiles and groups, to pipeline loads
        u, step = index // STEPS, index % STEPS
        group_first = end - BLOCK + ROWS * step
        k_position = group_first - KEYS * u + j
        k_real = (k_position >= start) & (k_position < end)
        q_position = group_first + b
        q_real = head_real & (q_position >= tl.maximum(start, offset))
        scores = tl.zeros([KEYS, N], tl.float32)
        for part in tl.static_range(SLICES):
            dim = part * SLICE + tl.arange(0, SLICE)
            k = _slice(key, k_real, dim, k_stride_l, k_position, D)  # [KEYS, SLICE]
            q = tl.load(
                q_source[:, None] + (q_position - offset).to(tl.int64)[:, None] * q_stride_l + dim[None, :],
                mask=q_real[:, None] & (dim < D)[None, :],
                other=0.0,
            )  # [N, SLICE]
            scores = tl.dot(k, tl.trans(q), scores, input_precision="ieee")
        norm = tl.load(lse + row * BLOCK + ROWS * step + b, mask=head_real, other=float("inf"))
        # Squaring the root keeps results that the hardware's exponential would flush to zero.
        root = tl.exp2(scores * (0.5 * scale) - (0.5 * norm)[None, :])
        probability = root * root
        if (u == 0) | (group_first - KEYS * u < start):  # some pair is masked
            visible = k_real[:, None] & (j[:, None] <= KEYS * u + b[None, :])
            probability = tl.where(visible, probability, 0.0)
        total = total * tl.where(step == 0, 0.0, 1.0) + probability
        by_key = tl.sum(tl.reshape(probability, [KEYS, HEADS, ROWS]), 2)  # [KEYS, HEADS]
        tl.store(
            vertical + (step * all_rows + out_row.to(tl.int64))[None, :] * kv_len + k_position[:, None],
            by_key,
            mask=k_real[:, None] & out_real[None, :],
        )
        if step == STEPS - 1:
            sheared = tl.gather(total, shear, 0)
            own = tl.sum(tl.reshape(tl.where(carried, 0.0, sheared), [KEYS, HEADS, ROWS]), 2)  # [KEYS, HEADS]
            at = KEYS * u - j
            tl.store(
                slash + out_row.to(tl.int64)[None, :] * kv_len + at[:, None],
                own + left,
                mask=((at >= 0) & (at < kv_len))[:, None] & out_real[None, :],
            )
            left = tl.sum(tl.reshape(tl.where(carried, sheared, 0.0), [KEYS, HEADS, ROWS]), 2)
    tl.store(
        carry + (split * all_rows + out_row.to(tl.int64))[None, :] * KEYS + j[:, None], left, mask=out_real[None, :]
    )


def heads_at_once(groups: int) -> int:
    """Heads of one kv group that share a tile: large groups fill it, an odd rest leaves part of it empty."""
    return min((4, 2, 1), key=lambda heads: cdiv(groups, heads) * (heads + 0.5))


def split_tiles(tiles: int, rows: int, device: torch.device) -> int:
    """Tiles per program: as many programs as the GPU runs at once twice over, but at most MAX_SPLITS per row."""
    splits = min(MAX_SPLITS, max(1, 2 * programs_at_once(device) // rows))
    return cdiv(tiles, min(splits, tiles))


def launch_options(warps: int, slices: int) -> dict[str, int]:
    """Warps and pipeline stages; several slices of the head dim leave no shared memory for a second stage."""
    return {"num_warps": warps, "num_stages": 2 if slices == 1 else 1}


def last_query_scores(query: Tensor, key: Tensor, ranges: Tensor, block_size: int, scale: float) -> LastQueryScores:
    """Both passes. query `[B, Hq, Lq, D]`, key `[B, Hkv, Lkv, D]`, ranges int32 `[B, 2]`."""
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    device = query.device
    rows, groups, offset = batch * heads, heads // kv_heads, kv_len - q_len
    width, count = head_slices(dim, query.dtype)
    constants = {"D": dim, "SLICE": width, "SLICES": count, "BLOCK": block_size}
    strides = (*query.stride()[:3], *key.stride()[:3])

    blocks = cdiv(kv_len, block_size)
    tiles = split_tiles(blocks, rows, device)
    splits = cdiv(blocks, tiles)
    partial = torch.empty(2, rows, splits, block_size, dtype=torch.float32, device=device)
    mean_query = torch.empty(rows, dim, dtype=torch.float32, device=device)
    lse = torch.empty(rows, block_size, dtype=torch.float32, device=device)
    with on_device(query):
        _lse_kernel[(splits, rows)](
            query, key, ranges, partial[0], partial[1], mean_query, *strides, heads, groups, offset, tiles,
            scale * LOG2E, **constants, **launch_options(8, count),
        )  # fmt: skip
        _combine_kernel[(rows,)](
            ranges, partial[0], partial[1], lse, heads, offset, splits, BLOCK=block_size,
            SPLITS=next_power_of_2(splits),
        )  # fmt: skip

        at_once = heads_at_once(groups)
        group_rows = min(KEYS, block_size // at_once)
        number = cdiv(kv_len - group_rows, KEYS) + 2
        programs = batch * kv_heads * cdiv(groups, at_once)
        tiles = split_tiles(number, programs, device)
        splits = cdiv(number, tiles)
        vertical = torch.empty(block_size // group_rows, rows, kv_len, dtype=torch.float32, device=device)
        slash = torch.empty(rows, kv_len, dtype=torch.float32, device=device)
        carry = torch.empty(splits, rows, KEYS, dtype=torch.float32, device=device)
        _sums_kernel[(splits, programs)](
            query, key, ranges, lse, vertical, slash, carry, *strides, heads, groups, kv_len, offset, rows, tiles,
            scale * LOG2E, **constants, KEYS=KEYS, ROWS=group_rows, HEADS=at_once, **launch_options(4, count),
        )  # fmt: skip
    return LastQueryScores(vertical, slash, carry, mean_query, group_rows, tiles)
