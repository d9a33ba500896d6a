"""The last step: one program per row block joins what the head keeps and writes the row's index lists."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range, top_of_row
from flexprefill_fa.kernels.row_lists import row_geometry, write_row

_UNSPECIALISED = [*LENGTHS, "q_blocks", "kv_blocks", "least", "most", "dense_tokens"]


@triton.jit
def _always_kept(block, start, row_first, row_last, BLOCK: tl.constexpr):
    """The first block with a real key and the block(s) on the diagonal."""
    return (block == start // BLOCK) | (block == row_first // BLOCK) | (block == row_last // BLOCK)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _published_rows_kernel(
    ranges,
    aware,  # [rows] int32
    columns,  # [rows, kv_blocks] int8, by absolute block
    diagonals,  # [rows, kv_blocks] int8, by blocks below the main diagonal
    pooled,  # [rows, q_blocks, kv_blocks] int8: Algorithm 4's blocks, defined for query-aware heads
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
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
    dense = (end - start <= dense_tokens) | (queries <= 1) | DENSE
    if dense == 0:
        kept = tl.load(columns + row * kv_blocks + block, mask=visible, other=0) != 0
        for kind in tl.static_range(2):
            below = (row_first if kind == 0 else row_last) // BLOCK - block
            kept |= tl.load(diagonals + row * kv_blocks + below, mask=visible & (below >= 0), other=0) != 0
        if HAS_AWARE:
            if tl.load(aware + row) != 0:
                source = pooled + (row * q_blocks + row_block) * kv_blocks + block
                kept |= tl.load(source, mask=visible, other=0) != 0
        keep = visible & (kept | _always_kept(block, start, row_first, row_last, BLOCK))
    write_row(
        keep, block, start, end, row_first, row * q_blocks + row_block, kv_blocks, partial_counts, partial_indices,
        full_counts, full_indices, BLOCK, ALL_PARTIAL, ZERO_TAILS,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _paper_rows_kernel(
    ranges,
    aware,  # [rows] int32
    column_sums,  # [rows, kv_blocks] fp32
    columns,  # [rows, kv_blocks] int8: blocks that hold a kept token
    diagonal_mass,  # [2, rows, kv_blocks + 2] fp32
    diagonal_hit,  # [2, rows, kv_blocks + 2] int8
    pooled_scores,  # [rows, q_blocks, kv_blocks] fp32, defined for query-aware heads
    pooled,  # [rows, q_blocks, kv_blocks] int8
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
    heads,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    dense_tokens,
    least,
    most,
    DENSE: tl.constexpr,
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
    dense = (end - start <= dense_tokens) | (queries <= 1) | DENSE
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
                source = (row * q_blocks + row_block) * kv_blocks + block
                kept = tl.load(pooled + source, mask=visible, other=0) != 0
                scores = tl.load(pooled_scores + source, mask=visible, other=0.0)
        always = visible & _always_kept(block, start, row_first, row_last, BLOCK)
        keep = visible & (kept | always)
        missing = tl.minimum(least, tl.sum(visible.to(tl.int32), 0)) - tl.sum(keep.to(tl.int32), 0)
        if missing > 0:
            keep |= top_of_row(tl.where(visible & (keep == 0), bits_of(scores), -1), missing)
        if LIMITED:
            droppable = keep & (always == 0)
            room = tl.maximum(most - tl.sum(always.to(tl.int32), 0), 0)
            if tl.sum(droppable.to(tl.int32), 0) > room:
                keep = always | top_of_row(tl.where(droppable, bits_of(scores), -1), room)
    write_row(
        keep, block, start, end, row_first, row * q_blocks + row_block, kv_blocks, partial_counts, partial_indices,
        full_counts, full_indices, BLOCK, ALL_PARTIAL, ZERO_TAILS,
    )  # fmt: skip


def empty_lists(batch: int, heads: int, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices."""
    shape = (batch, heads, grid.q_blocks)
    count, full_count = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    index, full_index = (torch.empty(*shape, grid.kv_blocks, dtype=torch.int32, device=device) for _ in range(2))
    return count, index, full_count, full_index


def row_constants(grid: Grid, all_partial: bool, zero_tails: bool) -> dict[str, int]:
    """Constants of both row kernels."""
    width = triton.next_power_of_2(grid.kv_blocks)
    return {
        "BLOCK": grid.block_size,
        "WIDTH": width,
        "ALL_PARTIAL": all_partial,
        "ZERO_TAILS": zero_tails,
        "num_warps": 4 if width <= 1024 else 8,
    }


def write_published_rows(
    ranges: Tensor,
    aware: Tensor,
    columns: Tensor,
    diagonals: Tensor,
    pooled: Tensor | None,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    grid: Grid,
    *,
    dense_tokens: int,
    dense: bool,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Fill the lists with the released selection."""
    batch, heads = lists[0].shape[:2]
    with on_device(ranges):
        _published_rows_kernel[(grid.q_blocks, batch * heads)](
            ranges, aware, columns, diagonals, aware if pooled is None else pooled, *lists, heads, grid.offset,
            grid.kv_len, grid.q_blocks, grid.kv_blocks, dense_tokens, DENSE=dense, HAS_AWARE=pooled is not None,
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip


def write_paper_rows(
    ranges: Tensor,
    aware: Tensor,
    column_sums: Tensor,
    columns: Tensor,
    diagonal_mass: Tensor,
    diagonal_hit: Tensor,
    pooled_scores: Tensor | None,
    pooled: Tensor | None,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
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
    none = pooled is None or pooled_scores is None
    with on_device(ranges):
        _paper_rows_kernel[(grid.q_blocks, batch * heads)](
            ranges, aware, column_sums, columns, diagonal_mass, diagonal_hit, aware if none else pooled_scores,
            aware if none else pooled, *lists, heads, grid.offset, grid.kv_len, grid.q_blocks, grid.kv_blocks,
            dense_tokens, least, most or 0, DENSE=False, HAS_AWARE=not none, LIMITED=most is not None,
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip
