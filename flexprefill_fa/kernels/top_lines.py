"""The top columns and the top block diagonals of each head, as many as its counts say."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range, top_of_row


class CoverageBudget(NamedTuple):
    """How FlexPrefill, as released, turns the tokens that a coverage needs into blocks."""

    aware: Tensor  # [B * Hq] int32, query-aware heads: they keep the least
    least: int  # blocks
    most: int  # blocks


@triton.jit
def _covering_blocks(tokens, real, aware, least, most):
    """Blocks for a coverage of so many tokens, of which there are `real`."""
    needed = tl.minimum(tokens, real)  # never more tokens than there are
    count = (needed + 1) // 128 + 1  # 128 whatever the block size, as released
    return tl.where(aware != 0, least, tl.minimum(tl.maximum(count, least), most))


@triton.jit(do_not_specialize=LENGTHS)
def _choose_kernel(
    column_sums,  # [rows, blocks]
    diagonal_sums,  # [rows, blocks]
    counts,  # [2, rows] int32, of columns and of diagonals: blocks, or the tokens that the coverage needs
    aware,  # [rows] int32
    ranges,
    kept,  # [2, rows, blocks] int8, out: columns by absolute block, diagonals by blocks below the main one
    heads,
    blocks,
    least,
    most,
    TOKENS: tl.constexpr,
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
    count = tl.load(counts + kind * rows + row)
    if TOKENS:
        count = _covering_blocks(count, end - base * BLOCK, tl.load(aware + row), least, most)
    count = tl.minimum(count, number)
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
    counts: Tensor,
    ranges: Tensor,
    *,
    heads: int,
    block_size: int,
    budget: CoverageBudget | None = None,
) -> Tensor:
    """Kept columns (by absolute block) and kept block diagonals (by distance), int8 `[2, B * Hq, nk]`.

    Args:
        column_sums, diagonal_sums: fp32 `[B * Hq, nk]`. ranges: int32 `[B, 2]`.
        counts: int32 `[2, B * Hq]`, columns and diagonals to keep, in blocks; at most all are kept.
        budget: given, counts are the tokens that a coverage needs, and this turns them into blocks.
    """
    rows, blocks = column_sums.shape
    kept = torch.empty(2, rows, blocks, dtype=torch.int8, device=column_sums.device)
    aware, least, most = budget or (counts, 0, 0)  # not read
    with on_device(column_sums):
        _choose_kernel[(rows, 2)](
            column_sums, diagonal_sums, counts, aware, ranges, kept, heads, blocks, least, most,
            TOKENS=budget is not None, BLOCK=block_size, WIDTH=next_power_of_2(blocks), num_warps=8,
        )  # fmt: skip
    return kept
