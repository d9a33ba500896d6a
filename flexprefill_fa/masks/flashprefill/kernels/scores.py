"""One score per row block and key block: log2 of the sum over the block's queries of exp(s q . mean(k_J)).

With m = max_q s q . k_J and S = sum_q exp(s q . k_J - m) it is log2(S) + m log2(e), minus infinity where no row
counts. So P[I, J] / P[I, J'] = 2 ** (score - score'), and a row's largest score stands for its largest P.

Pooled keys of bf16 or fp16 inputs are of that dtype, by the rule, so their scores take one matrix product, whose terms
are exact in fp32. Those of fp32 inputs are fp32, as the scores shall be, but only 16-bit products are fast: keys and
queries go as two fp16 numbers each, x = 2 ** e (high + low), with e per block such that the largest part lies in
[2^14, 2^15): together they hold 22 bits of every component that matters, whatever the range of the inputs. That takes
three products at full speed, where tf32 would take three of half the speed.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range
from flexprefill_fa.kernels.pooling import block_mean
from flexprefill_fa.kernels.row_lists import row_geometry

SPLIT_ROWS = 16  # pooled keys that one program of the split takes
SMALLEST_FACTOR = 1e-37  # of scores: minus infinity times 0 would be NaN


class PooledKeys(NamedTuple):
    """Mean keys as the products take them; block J of kv head g of element b is row (b Hkv + g) nk + J."""

    parts: Tensor  # [1, B * Hkv * nk, D], or of fp32 [2, B * Hkv * nk, BLOCK_D] fp16: high and low, 0 beyond D
    factors: Tensor  # [B * Hkv * nk] fp32: s log2(e) 2 ** e; read with two parts alone
    kv_heads: int
    scale: float  # s log2(e)


@triton.jit
def power_of_two(exponent):
    """2 ** exponent as fp32, for int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit_exponent(largest):
    """e such that 2 ** -e moves `largest` into [2^14, 2^15), at least -54: what is tiny may stay so."""
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -40) - 14


@triton.jit
def split(values, exponent):
    """High and low fp16 parts of values / 2 ** exponent."""
    scaled = values * power_of_two(-exponent)
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def line_place(line, q_blocks):
    """(row of B * Hq, row block) of a line of the scores. The last row blocks come first: they take longest."""
    return (line // q_blocks).to(tl.int64), q_blocks - 1 - line % q_blocks


@triton.jit
def counted_blocks(row_last, end, BLOCK: tl.constexpr):
    """End of the blocks whose last real key the row block's last real query sees: no row counts for those behind."""
    return tl.where(row_last == end - 1, row_last + BLOCK, row_last + 1) // BLOCK


@triton.jit(do_not_specialize=LENGTHS)
def _split_kernel(
    means,  # [all_rows, D] fp32
    parts,  # [2, all_rows, BLOCK_D] fp16, out
    factors,  # [all_rows] fp32, out
    all_rows,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    inside = row < all_rows
    source = means + row.to(tl.int64)[:, None] * D + dim[None, :]
    values = tl.load(source, mask=inside[:, None] & (dim < D)[None, :], other=0.0)  # [ROWS, BLOCK_D]
    exponent = unit_exponent(tl.max(tl.abs(values), 1))
    high, low = split(values, exponent[:, None])
    target = parts + row.to(tl.int64)[:, None] * BLOCK_D + dim[None, :]
    tl.store(target, high, mask=inside[:, None])
    tl.store(target + all_rows.to(tl.int64) * BLOCK_D, low, mask=inside[:, None])
    tl.store(factors + row, power_of_two(exponent) * scale, mask=inside)


@triton.jit(do_not_specialize=[*LENGTHS, "first_line"])
def _scores_kernel(
    query,  # [B, Hq, q_len, D]
    parts,
    factors,
    ranges,
    scores,  # [lines of this launch, kv_blocks] fp32, out: written up to the last block that a row counts for
    best_scores,  # [lines of this launch] fp32, out: their maxima
    q_stride_b,
    q_stride_h,
    q_stride_l,
    first_line,
    heads,
    groups,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    all_rows,
    scale,  # times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TWO_PARTS: tl.constexpr,
):
    """One program per row block of one head: the queries are read once, tiles of pooled keys pass by."""
    row, row_block = line_place(first_line + tl.program_id(0), q_blocks)
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    item = tl.arange(0, BLOCK)
    position = row_first + item
    real = (position >= start) & (position <= row_last)
    # Wide offsets in scalars, 32 bits within a tile: half of the instructions of a short row would be addresses.
    query += batch * q_stride_b + head * q_stride_h + (row_first - offset).to(tl.int64) * q_stride_l
    query_high = tl.load(
        query + item[:, None] * q_stride_l + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0
    )  # [BLOCK, BLOCK_D]
    key_width = D
    if TWO_PARTS:
        key_width = BLOCK_D
        exponent = unit_exponent(tl.max(tl.reshape(tl.abs(query_high), [BLOCK * BLOCK_D]), 0))
        query_high, query_low = split(query_high, exponent)
        query_factor = power_of_two(exponent)
    position = tl.where(real, position, -1)

    kv_row = (batch * (heads // groups) + head // groups) * kv_blocks
    parts += kv_row * key_width
    low_parts = parts + all_rows.to(tl.int64) * key_width
    factors += kv_row
    scores += tl.program_id(0).to(tl.int64) * kv_blocks
    last = counted_blocks(row_last, end, BLOCK)
    every_row = (row_first >= start) & (row_last == row_first + BLOCK - 1)
    whole = tl.where(every_row, (row_first + 1) // BLOCK, 0)  # all rows count for the blocks before
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    lane = tl.arange(0, COLUMNS)
    current = tl.full([COLUMNS], 0.0, tl.float32) + scale
    if TWO_PARTS:
        # Loaded one tile ahead: a value that a tile waits for costs as much as its products.
        factor = tl.load(factors + start // BLOCK + lane, mask=start // BLOCK + lane < last, other=0.0)
    for first in range(start // BLOCK, last, COLUMNS):
        block = first + lane
        inside = block < last
        source = block[:, None] * key_width + dim[None, :]
        loaded = inside[:, None] & (dim < key_width)[None, :]
        high = tl.load(parts + source, mask=loaded, other=0.0)  # [COLUMNS, BLOCK_D]
        # Keys are the rows of the product: sums and maxima over queries then stay inside a warp.
        products = tl.zeros([COLUMNS, BLOCK], tl.float32)
        if TWO_PARTS:
            low = tl.load(low_parts + source, mask=loaded, other=0.0)
            products = tl.dot(low, tl.trans(query_high), products)
            products = tl.dot(high, tl.trans(query_low), products)
            current = tl.maximum(factor * query_factor, 1e-37)  # minus infinity times 0 would be NaN
            factor = tl.load(factors + block + COLUMNS, mask=block + COLUMNS < last, other=0.0)
        products = tl.dot(high, tl.trans(query_high), products)
        if first + COLUMNS > whole:  # some row does not count for some block
            last_key = tl.minimum(block * BLOCK + BLOCK, end) - 1
            counts = inside[:, None] & (position[None, :] >= last_key[:, None])
            products = tl.where(counts, products, float("-inf"))
        highest = tl.max(products, 1) * current
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(products * current[:, None] - base[:, None]), 1)
        score = highest + tl.log2(tl.maximum(total, 1.0))  # S >= 1 where a row counts
        tl.store(scores + block, score, mask=inside)
        best = tl.maximum(best, score)
    tl.store(best_scores + tl.program_id(0), tl.max(best, 0))


def pooled_keys(key: Tensor, ranges: Tensor, block_size: int, scale: float) -> PooledKeys:
    """The mean keys of `[B, Hkv, Lkv, D]`, unit stride in D, with the score scale s."""
    mean_key = block_mean(key, ranges, 0, block_size, dtype=key.dtype)
    kv_heads, dim = key.shape[1], key.shape[3]
    rows = mean_key.numel() // dim
    scale = max(scale * LOG2E, SMALLEST_FACTOR)
    if key.dtype != torch.float32:
        return PooledKeys(mean_key.view(1, rows, dim), ranges, kv_heads, scale)
    padded = max(16, next_power_of_2(dim))
    parts = torch.empty(2, rows, padded, dtype=torch.float16, device=key.device)
    factors = torch.empty(rows, dtype=torch.float32, device=key.device)
    with on_device(key):
        _split_kernel[(cdiv(rows, SPLIT_ROWS),)](
            mean_key, parts, factors, rows, scale, D=dim, BLOCK_D=padded, ROWS=SPLIT_ROWS, num_warps=4
        )
    return PooledKeys(parts, factors, kv_heads, scale)


def tile_options(head_dim: int, two_parts: bool) -> dict[str, int]:
    """Pooled keys of a tile, warps and stages: three programs per Hopper multiprocessor up to D = 128."""
    if not two_parts:
        return {"COLUMNS": 64, "num_warps": 4, "num_stages": 2 if head_dim <= 128 else 1}
    return {"COLUMNS": 64 if head_dim <= 128 else 32, "num_warps": 8, "num_stages": 2 if head_dim <= 128 else 1}


def block_scores(
    query: Tensor, keys: PooledKeys, ranges: Tensor, scores: Tensor, best_scores: Tensor, grid: Grid, first_line: int
) -> None:
    """Fill `scores`, fp32 `[lines, nk]`, and `best_scores`, `[lines]`, for lines first_line, ... of `line_place`.

    query `[B, Hq, Lq, D]` with unit stride in D. Blocks that no row counts for stay unwritten or become minus infinity.
    """
    heads, dim = query.shape[1], query.shape[3]
    parts, rows, _ = keys.parts.shape
    with on_device(query):
        _scores_kernel[(scores.shape[0],)](
            query, keys.parts, keys.factors, ranges, scores, best_scores, *query.stride()[:3], first_line, heads,
            heads // keys.kv_heads, grid.offset, grid.kv_len, grid.q_blocks, grid.kv_blocks, rows, keys.scale, D=dim,
            BLOCK_D=max(16, next_power_of_2(dim)), BLOCK=grid.block_size, TWO_PARTS=parts == 2,
            **tile_options(dim, parts == 2),
        )  # fmt: skip
