"""The union of what the query heads of a key head keep, written over each one's lists."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range
from flexprefill_fa.kernels.kept_map import kept_map
from flexprefill_fa.kernels.outputs import prepare, row_constants
from flexprefill_fa.kernels.row_lists import finish_row, row_geometry, write_blocks

CHUNK = 512  # blocks of a row at a time


@triton.jit(do_not_specialize=LENGTHS)
def _unite_kernel(
    ranges,
    kept,  # [B * Hq, q_blocks, kv_blocks] int8
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
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
    row_first, _ = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
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
            written = write_blocks(
                some > 0, block, written, start, end, row_first, target, kv_blocks, partial_indices, full_indices,
                BLOCK, ALL_PARTIAL,
            )  # fmt: skip
        finish_row(
            written, target, kv_blocks, partial_counts, partial_indices, full_counts, full_indices, WIDTH, ZERO_TAILS
        )


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
    """Write the union over the lists, which are of full width, of each query head."""
    _, _, grid, ranges = prepare(query, key, starts, lengths, block_size)
    kv_heads = key.shape[1]
    kept = kept_map(lists, grid)
    with on_device(kept):
        _unite_kernel[(grid.q_blocks, query.shape[0] * kv_heads)](
            ranges, kept, *lists, kv_heads, query.shape[1] // kv_heads, grid.offset, grid.kv_len, grid.q_blocks,
            grid.kv_blocks, CHUNK=min(CHUNK, triton.next_power_of_2(grid.kv_blocks)),
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip
