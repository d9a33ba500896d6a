"""Step 3 as released: the top columns and the top block diagonals, as many as the coverage counts say."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range, top_of_row


@triton.jit(do_not_specialize=LENGTHS)
def _diagonal_sums_kernel(
    slash,  # [rows, kv_len] fp32, by offset
    ranges,
    sums,  # [rows, blocks] fp32, out
    heads,
    kv_len,
    blocks,
    BLOCK: tl.constexpr,
):
    """sums[t] over offsets [t B - s, t B - s + B), s = nb B - n: groups counted from the far end, as released."""
    diagonal, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    n = end - start // BLOCK * BLOCK
    shift = (n + BLOCK - 1) // BLOCK * BLOCK - n
    offset = diagonal * BLOCK - shift + tl.arange(0, BLOCK)
    values = tl.load(slash + row * kv_len + offset, mask=(offset >= 0) & (offset < n), other=0.0)
    tl.store(sums + row * blocks + diagonal, tl.sum(values, 0))


@triton.jit(do_not_specialize=LENGTHS)
def _choose_kernel(
    column_sums,  # [rows, blocks]
    diagonal_sums,  # [rows, blocks]
    column_tokens,  # [rows] int32, coverage counts
    diagonal_tokens,  # [rows] int32
    aware,  # [rows] int32
    ranges,
    columns,  # [rows, blocks] int8, out, by absolute block
    diagonals,  # [rows, blocks] int8, out, by blocks below the main diagonal
    heads,
    blocks,
    least,
    most,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    base = start // BLOCK
    number = (end + BLOCK - 1) // BLOCK - base  # nb
    lane = tl.arange(0, WIDTH)
    inside = lane < number
    high = tl.minimum(most, number)
    query_aware = tl.load(aware + row) != 0
    for kind in tl.static_range(2):
        tokens = tl.load((column_tokens if kind == 0 else diagonal_tokens) + row)
        count = (tokens + 1) // 128 + 1  # 128 whatever the block size, as released
        count = tl.minimum(tl.maximum(count, least), high)
        count = tl.where(query_aware, least, count)
        source = column_sums + row * blocks + base if kind == 0 else diagonal_sums + row * blocks
        scores = tl.load(source + lane, mask=inside, other=0.0)
        scores = tl.where(lane == 0, float("inf"), scores)
        chosen = top_of_row(tl.where(inside, bits_of(scores), -1), count)
        if kind == 0:
            target = columns + row * blocks + base
        else:
            target = diagonals + row * blocks
        tl.store(target + lane, chosen.to(tl.int8), mask=inside)


def choose(
    slash: Tensor,
    column_sums: Tensor,
    column_tokens: Tensor,
    diagonal_tokens: Tensor,
    aware: Tensor,
    ranges: Tensor,
    *,
    heads: int,
    least: int,
    most: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Kept columns (by absolute block) and kept block diagonals (by distance), int8 `[B * Hq, nk]` each."""
    rows, blocks = column_sums.shape
    diagonal_sums = torch.empty_like(column_sums)
    kept = torch.zeros(2, rows, blocks, dtype=torch.int8, device=slash.device)
    with on_device(slash):
        _diagonal_sums_kernel[(blocks, rows)](
            slash, ranges, diagonal_sums, heads, slash.shape[1], blocks, BLOCK=block_size
        )
        _choose_kernel[(rows,)](
            column_sums,
            diagonal_sums,
            column_tokens,
            diagonal_tokens,
            aware,
            ranges,
            kept[0],
            kept[1],
            heads,
            blocks,
            least,
            most,
            BLOCK=block_size,
            WIDTH=triton.next_power_of_2(blocks),
            num_warps=8,
        )
    return kept[0], kept[1]
