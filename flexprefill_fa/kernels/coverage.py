"""The shortest (or longest) prefix of the largest scores whose sum reaches (or stays within) a threshold, unsorted.

Non-negative fp32 numbers order like their bit patterns, so bisection over the 31 bits finds the exact value at which
the sorted cumulative sum would cross the threshold. Sums run in one fixed order: the result is bitwise repeatable.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device


@triton.jit(do_not_specialize=LENGTHS)
def _coverage_kernel(
    scores,  # [rows, length] fp32, not negative
    active,  # [rows] int32, rows with 0 are skipped
    thresholds,  # [rows] fp32
    counts,  # [rows] int32: length of the prefix
    member,  # [rows, length] int8: 1 for the items of the prefix
    length,
    KEEP_CROSSING: tl.constexpr,
    MARK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row. KEEP_CROSSING: sum >= threshold, shortest; else sum <= threshold, longest."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) != 0:
        goal = tl.load(thresholds + row)
        scores += row * length
        lane = tl.arange(0, TILE)
        value = 0  # bits of the crossing value: the largest whose inclusive sum crosses
        for step in range(31):
            candidate = value | (1 << (30 - step))
            total = tl.zeros([TILE], tl.float32)
            for first in range(0, length, TILE):
                tile = tl.load(scores + first + lane, mask=first + lane < length, other=0.0)
                total += tl.where(bits_of(tile) >= candidate, tile, 0.0)
            sum_from = tl.sum(total, 0)
            crosses = (sum_from >= goal) if KEEP_CROSSING else (sum_from > goal)
            value = tl.where(crosses, candidate, value)

        sum_above = tl.zeros([TILE], tl.float32)
        above = tl.zeros([TILE], tl.int32)
        for first in range(0, length, TILE):
            tile = tl.load(scores + first + lane, mask=first + lane < length, other=0.0)
            larger = (bits_of(tile) > value) & (first + lane < length)
            sum_above += tl.where(larger, tile, 0.0)
            above += larger.to(tl.int32)
        number_above = tl.sum(above, 0)
        # Items equal to the crossing value enter one by one, lower index first. A value of 0 means that no sum
        # crosses: everything is in the prefix.
        step_size = value.to(tl.float32, bitcast=True)
        steps = (goal - tl.sum(sum_above, 0)) / tl.maximum(step_size, 1e-45)
        steps = tl.minimum(tl.maximum(steps, 0.0), 2147483000.0)
        whole = tl.math.ceil(steps) if KEEP_CROSSING else tl.math.floor(steps)
        room = tl.where(value == 0, length, whole.to(tl.int32))
        if KEEP_CROSSING:
            room = tl.maximum(room, 1)

        seen = 0
        for first in range(0, length, TILE):
            inside = first + lane < length
            tile = tl.load(scores + first + lane, mask=inside, other=0.0)
            ties = (bits_of(tile) == value) & inside
            if MARK:
                rank = seen + tl.cumsum(ties.to(tl.int32), 0)
                kept = (bits_of(tile) > value) | (ties & (rank <= room))
                tl.store(member + row * length + first + lane, kept.to(tl.int8), mask=inside)
            seen += tl.sum(ties.to(tl.int32), 0)
        tl.store(counts + row, number_above + tl.minimum(room, seen))


def coverage(
    scores: Tensor, thresholds: Tensor, *, keep_crossing: bool, mark: bool, active: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The prefix of the largest scores that a threshold on their sum gives.

    Args:
        scores: fp32 `[rows, length]`, not negative. thresholds: fp32 `[rows]`.
        keep_crossing: the shortest prefix with sum >= threshold; else the longest with sum <= threshold.
        mark: also return which items belong to it.
        active: int32 `[rows]`, rows with 0 are left out (their results are undefined).

    Returns:
        int32 `[rows]` lengths of the prefix, and int8 `[rows, length]` or None.
    """
    rows, length = scores.shape
    counts = torch.empty(rows, dtype=torch.int32, device=scores.device)
    member = torch.empty(rows, length, dtype=torch.int8, device=scores.device) if mark else None
    if active is None:
        active = torch.ones(rows, dtype=torch.int32, device=scores.device)
    tile = min(4096, triton.next_power_of_2(length))
    with on_device(scores):
        _coverage_kernel[(rows,)](
            scores,
            active,
            thresholds,
            counts,
            member if member is not None else counts,
            length,
            KEEP_CROSSING=keep_crossing,
            MARK=mark,
            TILE=tile,
            num_warps=8,
        )
    return counts, member
