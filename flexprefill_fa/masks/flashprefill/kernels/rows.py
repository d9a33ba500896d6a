"""The last step: one program per row block writes the blocks whose score comes near the row's best."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range
from flexprefill_fa.kernels.outputs import row_constants
from flexprefill_fa.kernels.row_lists import finish_row, row_geometry, write_blocks
from flexprefill_fa.masks.flashprefill.config import FlashPrefillConfig
from flexprefill_fa.masks.flashprefill.kernels.scores import counted_blocks, line_place

CHUNK = 512  # blocks of a row at a time
# A block further below the best has P = 0 in fp32, and a block with P = 0 is kept by no alpha.
LOWEST = -149.0

_SETTINGS = ["first_line", "log_alpha", "sink_blocks", "window_blocks", "last_full_blocks"]


@triton.jit(do_not_specialize=[*LENGTHS, *_SETTINGS])
def _rows_kernel(
    ranges,
    scores,  # [lines of this launch, kv_blocks] fp32, in units of log 2
    best_scores,  # [lines of this launch] fp32
    partial_counts,
    full_counts,
    indices,  # [B * Hq, q_blocks, PARTIAL + kv_blocks]
    first_line,
    heads,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    log_alpha,
    sink_blocks,
    window_blocks,
    last_full_blocks,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    row, row_block = line_place(first_line + tl.program_id(0), q_blocks)
    start, end = real_range(ranges, row // heads)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    scores += tl.program_id(0).to(tl.int64) * kv_blocks
    counted = counted_blocks(row_last, end, BLOCK)
    base = start // BLOCK
    lane = tl.arange(0, CHUNK)
    threshold = tl.load(best_scores + tl.program_id(0)) + log_alpha

    is_last = row_block > (end - 1 - offset) // BLOCK - last_full_blocks
    window = tl.where(is_last, kv_blocks, window_blocks)  # the last rows' window is everything
    target = row * q_blocks + row_block
    written = 0
    for first in range(base, (row_last + BLOCK) // BLOCK, CHUNK):
        block = first + lane
        score = tl.load(scores + block, mask=block < counted, other=float("-inf"))
        keep = (score >= threshold) & (score > float("-inf"))
        keep |= (block < base + sink_blocks) | (row_first // BLOCK - block < window)
        written = write_blocks(
            keep & (block * BLOCK <= row_last), block, written, start, end, row_first, target, kv_blocks, indices,
            BLOCK, ALL_PARTIAL,
        )  # fmt: skip
    finish_row(written, target, kv_blocks, partial_counts, full_counts, indices, WIDTH, ZERO_TAILS)


def write_rows(
    ranges: Tensor,
    scores: Tensor,
    best_scores: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    config: FlashPrefillConfig,
    first_line: int,
    *,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Fill the lists of lines first_line, ... from `scores`, fp32 `[lines, nk]`, and `best_scores`, fp32 `[lines]`."""
    with on_device(ranges):
        _rows_kernel[(scores.shape[0],)](
            ranges, scores, best_scores, *lists, first_line, lists[0].shape[1], grid.offset, grid.kv_len, grid.q_blocks,
            grid.kv_blocks, max(math.log2(config.alpha), LOWEST), min(config.sink_blocks, grid.kv_blocks),
            min(config.window_blocks, grid.kv_blocks), min(config.last_full_blocks, grid.q_blocks),
            CHUNK=min(CHUNK, next_power_of_2(grid.kv_blocks)), num_warps=4,
            **row_constants(grid, all_partial, zero_tails),
        )  # fmt: skip
