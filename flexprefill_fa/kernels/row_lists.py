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
def _write_list(keep, block, counts, indices, target, blocks, ZERO_TAIL: tl.constexpr):
    number = keep.to(tl.int32)
    place = tl.cumsum(number, 0) - 1
    count = tl.sum(number, 0)
    tl.store(counts + target, count)
    tl.store(indices + target * blocks + place, block, mask=number != 0)
    if ZERO_TAIL:
        tl.store(indices + target * blocks + block, tl.zeros_like(block), mask=(block >= count) & (block < blocks))


@triton.jit
def write_row(
    keep,  # [WIDTH] bool
    block,  # [WIDTH] int32, 0 ... WIDTH - 1
    start,
    end,
    row_first,
    target,
    blocks,
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
    BLOCK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    """Full list: blocks wholly below the causal boundary and wholly real; partial list: the rest."""
    full = keep & (block * BLOCK + BLOCK - 1 <= row_first) & (block * BLOCK >= start) & (block * BLOCK + BLOCK <= end)
    if ALL_PARTIAL:
        full = keep & (block < 0)
    _write_list(keep & (full == 0), block, partial_counts, partial_indices, target, blocks, ZERO_TAILS)
    _write_list(full, block, full_counts, full_indices, target, blocks, ZERO_TAILS)
