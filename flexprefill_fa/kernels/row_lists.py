"""Device functions that turn one row of kept blocks into FlexAttention's two index lists."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def row_geometry(start, end, row_block, offset, kv_len, BLOCK: tl.constexpr):
    """Positions of the row block's first query and of its last real query (-1: it holds none)."""
    row_first = offset + row_block * BLOCK
    row_last = tl.minimum(tl.minimum(row_first + BLOCK, kv_len), end) - 1
    return row_first, tl.where(row_last >= tl.maximum(row_first, start), row_last, -1)


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
    partial_indices,
    full_indices,
    BLOCK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
):
    """Append the kept ones of some blocks to the row's lists, and count them.

    Full list: blocks wholly below the causal boundary and wholly real; partial list: the rest. Both counts share one
    number, so that one scan places both.
    """
    full = keep & (block * BLOCK + BLOCK - 1 <= row_first) & (block * BLOCK >= start) & (block * BLOCK + BLOCK <= end)
    if ALL_PARTIAL:
        full = keep & (block < 0)
    partial = keep & (full == 0)
    number = full.to(tl.int32) | (partial.to(tl.int32) << 16)
    place = written + tl.cumsum(number, 0) - number
    tl.store(full_indices + target * blocks + (place & 0xFFFF), block, mask=full)
    tl.store(partial_indices + target * blocks + (place >> 16), block, mask=partial)
    return written + tl.sum(number, 0)


@triton.jit
def finish_row(
    written,
    target,
    blocks,
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
    WIDTH: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    """Store the counts, and zeros behind the lists where whole outputs are to be compared."""
    tl.store(partial_counts + target, written >> 16)
    tl.store(full_counts + target, written & 0xFFFF)
    if ZERO_TAILS:
        block = tl.arange(0, WIDTH)
        zeros = tl.zeros_like(block)
        inside = block < blocks
        tl.store(partial_indices + target * blocks + block, zeros, mask=inside & (block >= (written >> 16)))
        tl.store(full_indices + target * blocks + block, zeros, mask=inside & (block >= (written & 0xFFFF)))
