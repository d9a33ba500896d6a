"""Step 3 as released: the top columns and the top block diagonals, as many as the coverage counts say."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range, top_of_row


@triton.jit(do_not_specialize=LENGTHS)
def _choose_kernel(
    column_sums,  # [rows, blocks]
    diagonal_sums,  # [rows, blocks]
    tokens,  # [2, rows] int32, coverage counts of columns and diagonals
    aware,  # [rows] int32
    ranges,
    kept,  # [2, rows, blocks] int8, out: columns by absolute block, diagonals by blocks below the main one
    heads,
    blocks,
    least,
    most,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per row and kind."""
    row, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0)
    start, end = real_range(ranges, row // heads)
    base = start // BLOCK
    number = (end + BLOCK - 1) // BLOCK - base  # nb
    lane = tl.arange(0, WIDTH)
    first = tl.where(kind == 0, base, 0)
    place = lane - first
    inside = (place >= 0) & (place < number)
    needed = tl.minimum(tl.load(tokens + kind * rows + row), end - base * BLOCK)  # never more tokens than there are
    count = (needed + 1) // 128 + 1  # 128 whatever the block size, as released
    count = tl.minimum(tl.maximum(count, least), tl.minimum(most, number))
    count = tl.where(tl.load(aware + row) != 0, least, count)
    if kind == 0:
        scores = tl.load(column_sums + row * blocks + lane, mask=inside, other=0.0)
    else:
        scores = tl.load(diagonal_sums + row * blocks + lane, mask=inside, other=0.0)
    scores = tl.where(place == 0, float("inf"), scores)
    chosen = top_of_row(tl.where(inside, bits_of(scores), -1), count)
    tl.store(kept + (kind * rows + row) * blocks + lane, (chosen & inside).to(tl.int8), mask=lane < blocks)


def choose(
    column_sums: Tensor,
    diagonal_sums: Tensor,
    tokens: Tensor,
    aware: Tensor,
    ranges: Tensor,
    *,
    heads: int,
    least: int,
    most: int,
    block_size: int,
) -> Tensor:
    """Kept columns (by absolute block) and kept block diagonals (by distance), int8 `[2, B * Hq, nk]`.

    Args:
        column_sums, diagonal_sums: fp32 `[B * Hq, nk]`. tokens: int32 `[2, B * Hq]`, what the coverage needs.
        aware: int32 `[B * Hq]`. ranges: int32 `[B, 2]`. least, most: budgets in blocks.
    """
    rows, blocks = column_sums.shape
    kept = torch.empty(2, rows, blocks, dtype=torch.int8, device=column_sums.device)
    with on_device(column_sums):
        _choose_kernel[(rows, 2)](
            column_sums, diagonal_sums, tokens, aware, ranges, kept, heads, blocks, least, most, BLOCK=block_size,
            WIDTH=triton.next_power_of_2(blocks), num_warps=8,
        )  # fmt: skip
    return kept
