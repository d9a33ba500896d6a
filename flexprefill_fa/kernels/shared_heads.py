"""Index lists of a table of kept blocks, and of the union over the query heads of a key head."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid, next_power_of_2
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range, unpadded_ranges
from flexprefill_fa.kernels.kept_map import kept_map
from flexprefill_fa.kernels.outputs import empty_lists, prepare, row_constants
from flexprefill_fa.kernels.row_lists import finish_row, row_geometry, write_blocks

CHUNK = 512  # blocks of a row at a time


@triton.jit(do_not_specialize=LENGTHS)
def _unite_kernel(
    ranges,
    kept,  # [B * Hq, q_blocks, kv_blocks] int8
    partial_counts,
    full_counts,
    indices,  # [B * Hq, q_blocks, PARTIAL + kv_blocks]
    kv_heads,
    groups,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    """One program per row block and key head."""
    row_block, kv_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, kv_row // kv_heads)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    lane = tl.arange(0, CHUNK)
    for head in range(groups):
        target = (kv_row * groups + head) * q_blocks + row_block
        written = 0
        for first in range(0, kv_blocks, CHUNK):
            block = first + lane
            some = tl.zeros([CHUNK], tl.int32)
            for other in range(groups):
                place = ((kv_row * groups + other) * q_blocks + row_block) * kv_blocks
                some |= tl.load(kept + place + block, mask=block < kv_blocks, other=0).to(tl.int32)
            keep = (some > 0) & (block * BLOCK <= row_last) & (block * BLOCK + BLOCK > start)
            written = write_blocks(
                keep, block, written, start, end, row_first, target, kv_blocks, indices, BLOCK, ALL_PARTIAL
            )
        finish_row(written, target, kv_blocks, partial_counts, full_counts, indices, WIDTH, ZERO_TAILS)


def unite_heads(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    lists: tuple[Tensor, ...],
    block_size: int,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Write the union over the lists, as `empty_lists` made them, of each query head."""
    _, _, grid, ranges = prepare(query, key, starts, lengths, block_size)
    _unite(
        kept_map(both_lists(lists), grid), ranges, lists, grid, query.shape[1] // key.shape[1], all_partial, zero_tails
    )


def lists_of(
    kept: Tensor, ranges: Tensor | None, grid: Grid, all_partial: bool, zero_tails: bool
) -> tuple[Tensor, ...]:
    """Index lists of a bool `[B, Hq, nq, nk]` of at most `MAX_BLOCKS` nk, without the blocks that no real query sees.

    Args:
        kept: of any strides. ranges: int32 `[B, 2]` of (start, end), None without padding.
        grid, all_partial, zero_tails: as of `Selector.operator`.
    """
    lists = empty_lists(*kept.shape[:2], grid, kept.device)
    if ranges is None:
        ranges = unpadded_ranges(kept.shape[0], grid.kv_len, kept.device)
    _unite(kept.contiguous().view(torch.int8), ranges, lists, grid, 1, all_partial, zero_tails)
    return lists


def _unite(
    kept: Tensor,
    ranges: Tensor,
    lists: tuple[Tensor, ...],
    grid: Grid,
    groups: int,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Fill the lists from kept, int8 `[B, Hq, nq, nk]`."""
    batch, kv_heads = kept.shape[0], kept.shape[1] // groups
    with on_device(kept):
        _unite_kernel[(grid.q_blocks, batch * kv_heads)](
            ranges, kept, *lists, kv_heads, groups, grid.offset, grid.kv_len, grid.q_blocks,
            grid.kv_blocks, CHUNK=min(CHUNK, next_power_of_2(grid.kv_blocks)),
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip
