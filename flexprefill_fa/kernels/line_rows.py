"""The row writer of selectors that keep columns and diagonals: one program per row block writes its index lists."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range
from flexprefill_fa.kernels.coverage import Prefix, in_prefix
from flexprefill_fa.kernels.outputs import row_constants
from flexprefill_fa.kernels.row_lists import finish_row, row_geometry, write_blocks

CHUNK = 512  # blocks of a row at a time


@triton.jit
def always_kept(block, start, row_first, row_last, BLOCK: tl.constexpr):
    """The first block with a real key and the block(s) on the diagonal."""
    return (block == start // BLOCK) | (block == row_first // BLOCK) | (block == row_last // BLOCK)


@triton.jit(do_not_specialize=LENGTHS)
def _line_rows_kernel(
    ranges,
    aware,  # [rows] int32
    chosen,  # [2, rows, kv_blocks] int8: columns by absolute block, diagonals by blocks below the main one
    pooled_scores,  # [rows, q_blocks, kv_blocks] fp32, defined for query-aware heads
    values,  # [rows] int32, Algorithm 4's prefix
    cuts,  # [rows] int32
    partial_counts,
    full_counts,
    indices,  # [B * Hq, q_blocks, PARTIAL + kv_blocks]
    heads,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    dense_tokens,
    DENSE: tl.constexpr,
    HAS_AWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    row_block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    queries = end - tl.maximum(start, offset)
    dense = (end - start <= dense_tokens) | (queries <= 1) | DENSE
    target = row * q_blocks + row_block
    aware_row = 0
    if HAS_AWARE:
        aware_row = tl.load(aware + row)
    written = 0
    for first in range(start // BLOCK, (row_last + BLOCK) // BLOCK, CHUNK):
        block = first + tl.arange(0, CHUNK)
        visible = block * BLOCK <= row_last
        keep = visible
        if dense == 0:
            kept = tl.load(chosen + row * kv_blocks + block, mask=visible, other=0) != 0
            diagonals = chosen + (tl.num_programs(1) + row) * kv_blocks
            for kind in tl.static_range(2):
                below = (row_first if kind == 0 else row_last) // BLOCK - block
                kept |= tl.load(diagonals + below, mask=visible & (below >= 0), other=0) != 0
            if HAS_AWARE:
                if aware_row != 0:
                    place = row_block * kv_blocks + block
                    scores = tl.load(pooled_scores + row * q_blocks * kv_blocks + place, mask=visible, other=0.0)
                    kept |= in_prefix(bits_of(scores), place, tl.load(values + row), tl.load(cuts + row))
            keep = visible & (kept | always_kept(block, start, row_first, row_last, BLOCK))
        written = write_blocks(
            keep, block, written, start, end, row_first, target, kv_blocks, indices, BLOCK, ALL_PARTIAL
        )
    finish_row(written, target, kv_blocks, partial_counts, full_counts, indices, WIDTH, ZERO_TAILS)


def pooled_arguments(scores: Tensor | None, prefix: Prefix | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 4's scores and prefix as the kernels take them; something to point at where there are none."""
    if scores is None or prefix is None:
        return unused, unused, unused
    return scores, prefix.value, prefix.cut


def write_line_rows(
    ranges: Tensor,
    aware: Tensor | None,
    chosen: Tensor,
    pooled_scores: Tensor | None,
    pooled: Prefix | None,
    lists: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    *,
    dense_tokens: int,
    dense: bool,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Fill the lists with the chosen lines, the blocks that are always kept, and what Algorithm 4 adds, if it is given.

    Args:
        chosen: int8 `[2, B * Hq, nk]`, columns and diagonals, see `choose` in top_lines.py; not read if dense.
        aware: int32 `[B * Hq]`, heads that keep Algorithm 4's prefix `pooled` of `pooled_scores` too; read with these.
        dense_tokens: elements of at most this many real tokens keep everything. dense: all of them do.
    """
    if aware is None:
        aware = ranges  # not read
    batch, heads = lists[0].shape[:2]
    with on_device(ranges):
        _line_rows_kernel[(grid.q_blocks, batch * heads)](
            ranges, aware, chosen, *pooled_arguments(pooled_scores, pooled, aware), *lists, heads, grid.offset,
            grid.kv_len, grid.q_blocks, grid.kv_blocks, dense_tokens, DENSE=dense, HAS_AWARE=pooled is not None,
            CHUNK=min(CHUNK, next_power_of_2(grid.kv_blocks)), num_warps=4,
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip
