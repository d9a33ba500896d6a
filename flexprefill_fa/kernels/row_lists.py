"""Device functions that turn one row of kept blocks into FlexAttention's two index lists.

Both stand in one row of `indices`, of `blocks + PARTIAL` columns: see `index_lists.py`.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from flexprefill_fa import index_lists

PARTIAL = tl.constexpr(index_lists.PARTIAL)  # column of the full list


@triton.jit
def row_geometry(start, end, row_block, offset, kv_len, BLOCK: tl.constexpr):
    """Positions of the row block's first query and of its last real query (-1: it holds none)."""
    row_first = offset + row_block * BLOCK
    row_last = tl.minimum(tl.minimum(row_first + BLOCK, kv_len), end) - 1
    return row_first, tl.where(row_last >= tl.maximum(row_first, start), row_last, -1)


@triton.jit
def _whole(block, start, end, row_first, BLOCK: tl.constexpr, ALL_PARTIAL: tl.constexpr):
    """Whether a block lies wholly below the causal boundary and is wholly real."""
    if ALL_PARTIAL:
        return block < 0
    return (block * BLOCK + BLOCK - 1 <= row_first) & (block * BLOCK >= start) & (block * BLOCK + BLOCK <= end)


@triton.jit
def list_row(indices, target, blocks):
    """Where a row of both lists begins."""
    return indices + target * (blocks + PARTIAL)


@triton.jit
def write_block(
    block, written, start, end, row_first, target, blocks, indices, BLOCK: tl.constexpr, ALL_PARTIAL: tl.constexpr
):
    """`write_blocks` of one block, which is kept."""
    full = _whole(block, start, end, row_first, BLOCK, ALL_PARTIAL)
    line = list_row(indices, target, blocks)
    tl.store(line + PARTIAL + (written & 0xFFFF), block, mask=full)
    tl.store(line + (written >> 16), block, mask=full == 0)
    return written + tl.where(full, 1, 1 << 16)


@triton.jit
def write_whole_blocks(keep, block, written, target, blocks, indices, ALL_PARTIAL: tl.constexpr):
    """`write_blocks` of blocks that lie wholly below the causal boundary and are wholly real."""
    number = keep.to(tl.int32)
    before = tl.cumsum(number, 0) - number
    line = list_row(indices, target, blocks)
    if ALL_PARTIAL:
        tl.store(line + (written >> 16) + before, block, mask=keep)
        return written + (tl.sum(number, 0) << 16)
    tl.store(line + PARTIAL + (written & 0xFFFF) + before, block, mask=keep)
    return written + tl.sum(number, 0)


@triton.jit
def write_blocks(
    keep,  # [N] bool
    block,  # [N] int32, consecutive
    written,  # int32: partial blocks << 16 | full blocks that this row has written before
    start,
    end,
    row_first,
    target,
    blocks,
    indices,
    BLOCK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
):
    """Append the kept ones of some blocks to the row's lists, and count them.

    Full list: blocks wholly below the causal boundary and wholly real; partial list: the rest. Both counts share one
    number, so that one scan places both.
    """
    full = keep & _whole(block, start, end, row_first, BLOCK, ALL_PARTIAL)
    partial = keep & (full == 0)
    number = full.to(tl.int32) | (partial.to(tl.int32) << 16)
    place = written + tl.cumsum(number, 0) - number
    line = list_row(indices, target, blocks)
    tl.store(line + PARTIAL + (place & 0xFFFF), block, mask=full)
    tl.store(line + (place >> 16), block, mask=partial)
    return written + tl.sum(number, 0)


@triton.jit
def finish_row(
    written, target, blocks, partial_counts, full_counts, indices, WIDTH: tl.constexpr, ZERO_TAILS: tl.constexpr
):
    """Store the counts, and zeros in neither list where whole outputs are to be compared."""
    tl.store(partial_counts + target, written >> 16)
    tl.store(full_counts + target, written & 0xFFFF)
    if ZERO_TAILS:
        line = list_row(indices, target, blocks)
        column = tl.arange(0, PARTIAL)
        tl.store(line + column, tl.zeros_like(column), mask=column >= (written >> 16))
        place = tl.arange(0, WIDTH)  # of the full list
        unused = (place >= (written & 0xFFFF)) & (place + PARTIAL >= (written >> 16))
        tl.store(line + PARTIAL + place, tl.zeros_like(place), mask=(place < blocks) & unused)
