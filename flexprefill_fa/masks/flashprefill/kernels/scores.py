"""One score per row block and key block: log2 of the sum over the block's queries of exp(s q . mean(k_J)).

With m = max_q s q . k_J and S = sum_q exp(s q . k_J - m) it is log2(S) + m log2(e), minus infinity where no row
counts. So P[I, J] / P[I, J'] = 2 ** (score - score'), and a row's largest score stands for its largest P.

The pooled keys are fp32, and the scores shall be, but only 16-bit matrix products are fast. So keys are stored as two
fp16 numbers, k = 2 ** e (high + low), with e per block such that the largest part lies in [2^14, 2^15): together they
hold 22 bits of every component that matters, whatever the range of the inputs. Queries are scaled alike, once per
program; bf16 and fp16 then fit in one fp16 number, fp32 takes two. Products of fp16 numbers are exact in fp32. Against
three tf32 products of half the speed this takes two (fp32 queries: three) at full speed; two bf16 parts, without the
scaling, would hold 16 bits, which a channel with large keys shows in the scores.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range
from flexprefill_fa.kernels.row_lists import row_geometry

SPLIT_ROWS = 16  # pooled keys that one program of the split takes


class PooledKeys(NamedTuple):
    """Mean keys in two fp16 parts; block J of kv head g of element b is row (b Hkv + g) nk + J."""

    parts: Tensor  # [2, B * Hkv * nk, BLOCK_D] fp16, high and low, 0 in the padding of D
    factors: Tensor  # [B * Hkv * nk] fp32: s log2(e) 2 ** e
    kv_heads: int


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
    values = tl.load(
        query + item[:, None] * q_stride_l + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0
    ).to(tl.float32)
    exponent = unit_exponent(tl.max(tl.reshape(tl.abs(values), [BLOCK * BLOCK_D]), 0))
    query_high, query_low = split(values, exponent)  # [BLOCK, BLOCK_D]
    query_factor = power_of_two(exponent)
    position = tl.where(real, position, -1)

    kv_row = (batch * (heads // groups) + head // groups) * kv_blocks
    parts += kv_row * BLOCK_D
    low_parts = parts + all_rows.to(tl.int64) * BLOCK_D
    factors += kv_row
    scores += tl.program_id(0).to(tl.int64) * kv_blocks
    last = counted_blocks(row_last, end, BLOCK)
    every_row = (row_first >= start) & (row_last == row_first + BLOCK - 1)
    whole = tl.where(every_row, (row_first + 1) // BLOCK, 0)  # all rows count for the blocks before
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    lane = tl.arange(0, COLUMNS)
    # Loaded one tile ahead: a value that a tile waits for costs as much as its products.
    factor = tl.load(factors + start // BLOCK + lane, mask=start // BLOCK + lane < last, other=0.0)
    for first in range(start // BLOCK, last, COLUMNS):
        block = first + lane
        inside = block < last
        current = tl.maximum(factor * query_factor, 1e-37)  # minus infinity times 0 would be NaN
        factor = tl.load(factors + block + COLUMNS, mask=block + COLUMNS < last, other=0.0)
        source = block[:, None] * BLOCK_D + dim[None, :]
        high = tl.load(parts + source, mask=inside[:, None], other=0.0)  # [COLUMNS, BLOCK_D]
        low = tl.load(low_parts + source, mask=inside[:, None], other=0.0)
        # Keys are the rows of the product: sums and maxima over queries then stay inside a warp.
        products = tl.dot(low, tl.trans(query_high))  # [COLUMNS, BLOCK]
        if TWO_PARTS:
            products = tl.dot(high, tl.trans(query_low), products)
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


def split_keys(mean_key: Tensor, scale: float) -> PooledKeys:
    """The parts of mean keys fp32 `[B, Hkv, nk, D]`, with the score scale in their factors."""
    dim = mean_key.shape[-1]
    rows = mean_key.numel() // dim
    padded = max(16, triton.next_power_of_2(dim))
    parts = torch.empty(2, rows, padded, dtype=torch.float16, device=mean_key.device)
    factors = torch.empty(rows, dtype=torch.float32, device=mean_key.device)
    with on_device(mean_key):
        _split_kernel[(triton.cdiv(rows, SPLIT_ROWS),)](
            mean_key, parts, factors, rows, scale * LOG2E, D=dim, BLOCK_D=padded, ROWS=SPLIT_ROWS, num_warps=4
        )
    return PooledKeys(parts, factors, mean_key.shape[1])


def tile_options(head_dim: int, two_parts: bool) -> dict[str, int]:
    """Pooled keys of a tile, warps and stages: two programs per multiprocessor up to D = 128, within 163 KB beyond."""
    if head_dim <= 128:
        return {"COLUMNS": 64, "num_warps": 4 if not two_parts else 8, "num_stages": 2 if two_parts else 1}
    return {"COLUMNS": 32, "num_warps": 8, "num_stages": 1 if two_parts else 2}


def block_scores(
    query: Tensor, keys: PooledKeys, ranges: Tensor, scores: Tensor, best_scores: Tensor, grid: Grid, first_line: int
) -> None:
    """Fill `scores`, fp32 `[lines, nk]`, and `best_scores`, `[lines]`, for lines first_line, ... of `line_place`.

    query `[B, Hq, Lq, D]` with unit stride in D. Blocks that no row counts for stay unwritten or become minus infinity.
    """
    heads, dim = query.shape[1], query.shape[3]
    two_parts = query.dtype == torch.float32
    with on_device(query):
        _scores_kernel[(scores.shape[0],)](
            query, keys.parts, keys.factors, ranges, scores, best_scores, *query.stride()[:3], first_line, heads,
            heads // keys.kv_heads, grid.offset, grid.kv_len, grid.q_blocks, grid.kv_blocks, keys.factors.shape[0],
            D=dim, BLOCK_D=keys.parts.shape[2], BLOCK=grid.block_size, TWO_PARTS=two_parts,
            **tile_options(dim, two_parts),
        )  # fmt: skip
