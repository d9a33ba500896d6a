"""The last step as printed: one program per row block joins what the head keeps and writes the row's index lists."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range, top_of_row
from flexprefill_fa.kernels.coverage import Prefix, in_prefix
from flexprefill_fa.kernels.line_rows import always_kept, pooled_arguments
from flexprefill_fa.kernels.outputs import row_constants
from flexprefill_fa.kernels.row_lists import finish_row, row_geometry, write_blocks


@triton.jit(do_not_specialize=LENGTHS)
def _paper_rows_kernel(
    ranges,
    aware,  # [rows] int32
    column_sums,  # [rows, kv_blocks] fp32
    columns,  # [rows, kv_blocks] int8: blocks that hold a kept token
    diagonal_mass,  # [2, rows, kv_blocks + 2] fp32
    diagonal_hit,  # [2, rows, kv_blocks + 2] int8
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
    least,
    most,
    HAS_AWARE: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    row_block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    block = tl.arange(0, WIDTH)
    visible = (block >= start // BLOCK) & (block * BLOCK <= row_last)
    keep = visible
    queries = end - tl.maximum(start, offset)
    dense = (end - start <= dense_tokens) | (queries <= 1)
    if dense == 0:
        is_last = row_last == end - 1
        diagonal = row_block - block + offset // BLOCK + 1
        at = (is_last.to(tl.int64) * tl.num_programs(1) + row) * (kv_blocks + 2) + diagonal
        kept = tl.load(columns + row * kv_blocks + block, mask=visible, other=0) != 0
        kept |= tl.load(diagonal_hit + at, mask=visible, other=0) != 0
        scores = tl.load(column_sums + row * kv_blocks + block, mask=visible, other=0.0)
        scores += tl.load(diagonal_mass + at, mask=visible, other=0.0)
        if HAS_AWARE:
            if tl.load(aware + row) != 0:
                place = row_block * kv_blocks + block
                scores = tl.load(pooled_scores + row * q_blocks * kv_blocks + place, mask=visible, other=0.0)
                kept = in_prefix(bits_of(scores), place, tl.load(values + row), tl.load(cuts + row))
        always = visible & always_kept(block, start, row_first, row_last, BLOCK)
        keep = visible & (kept | always)
        missing = tl.minimum(least, tl.sum(visible.to(tl.int32), 0)) - tl.sum(keep.to(tl.int32), 0)
        if missing > 0:
            keep |= top_of_row(tl.where(visible & (keep == 0), bits_of(scores), -1), missing)
        if LIMITED:
            droppable = keep & (always == 0)
            room = tl.maximum(most - tl.sum(always.to(tl.int32), 0), 0)
            if tl.sum(droppable.to(tl.int32), 0) > room:
                keep = always | top_of_row(tl.where(droppable, bits_of(scores), -1), room)
    target = row * q_blocks + row_block
    written = write_blocks(keep, block, 0, start, end, row_first, target, kv_blocks, indices, BLOCK, ALL_PARTIAL)
    finish_row(written, target, kv_blocks, partial_counts, full_counts, indices, WIDTH, ZERO_TAILS)


def write_paper_rows(
    ranges: Tensor,
    aware: Tensor,
    column_sums: Tensor,
    columns: Tensor,
    diagonal_mass: Tensor,
    diagonal_hit: Tensor,
    pooled_scores: Tensor | None,
    pooled: Prefix | None,
    lists: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    *,
    dense_tokens: int,
    least: int,
    most: int | None,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Fill the lists with the printed algorithms' selection."""
    batch, heads = lists[0].shape[:2]
    with on_device(ranges):
        _paper_rows_kernel[(grid.q_blocks, batch * heads)](
            ranges, aware, column_sums, columns, diagonal_mass, diagonal_hit,
            *pooled_arguments(pooled_scores, pooled, aware), *lists, heads, grid.offset, grid.kv_len, grid.q_blocks,
            grid.kv_blocks, dense_tokens, least, most or 0, HAS_AWARE=pooled is not None,
            LIMITED=most is not None, num_warps=4 if grid.kv_blocks <= 1024 else 8,
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip
