"""The shortest (or longest) prefix of the largest scores whose sum reaches (or stays within) a threshold, unsorted.

Non-negative fp32 numbers order like their bit patterns. So the value at which the sorted cumulative sum crosses the
threshold is found digit by digit, three bits at a time: for each of the eight digits that could come next, the sum of
the scores that are at least as large. Sums run in one fixed order: the result is bitwise repeatable. Long rows are
shared by many programs, one launch per digit; short ones take one program and one launch.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import cdiv, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, on_device, programs_at_once
from flexprefill_fa.kernels.digits import (
    DIGIT_BITS,
    DIGITS,
    WAYS,
    above_and_ties,
    is_active,
    next_digit,
    place_of_tie,
    room_for_ties,
    sums_from,
)

LINE = 4096  # items of a flat row that one program takes at least
SHORT = 32768  # items up to which one program per row is about as fast as a launch per digit
MAX_SPLITS = 128
SHORT_TILE, SHORT_WARPS = 2048, 8  # items at a time, one program per row
TILE, WARPS = 1024, 4  # many programs per row


class Prefix(NamedTuple):
    """Which items of each row belong to its prefix: `in_prefix` tells, from an item's bits and place."""

    length: Tensor  # int32 [rows], number of items
    value: Tensor  # int32 [rows], bits of the crossing value: larger items belong
    cut: Tensor  # int32 [rows], place of the last item equal to it that belongs, -1 if none does


@triton.jit
def in_prefix(bits, place, value, cut):
    """Whether items belong to a prefix."""
    return (bits > value) | ((bits == value) & (place <= cut))


@triton.jit(do_not_specialize=LENGTHS)
def _short_kernel(
    scores,  # [rows, length] fp32, not negative
    active,  # [rows] int32, rows with 0 are skipped
    thresholds,  # [rows] fp32
    counts,
    values,
    cuts,
    length,
    line,
    lines,
    first_width,
    KEEP_CROSSING: tl.constexpr,
    ALL: tl.constexpr,
    LINE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    if is_active(active, row, ALL):
        threshold = tl.load(thresholds + row)
        scores += row * length
        value = 0
        for digit in range(DIGITS):
            shift = DIGIT_BITS * (DIGITS - 1 - digit)
            sums = sums_from(scores, length, line, 0, lines, first_width, value, shift, LINE_TILE, TILE)
            value |= next_digit(sums, threshold, KEEP_CROSSING) << shift
        above, total, ties = above_and_ties(scores, length, line, 0, lines, first_width, value, LINE_TILE, TILE)
        room = tl.minimum(room_for_ties(value, total, threshold, KEEP_CROSSING), ties)
        tl.store(counts + row, above + room)
        tl.store(values + row, value)
        tl.store(cuts + row, place_of_tie(scores, length, line, 0, lines, first_width, value, room, LINE_TILE, TILE))


@triton.jit(do_not_specialize=LENGTHS)
def _digit_kernel(
    scores,
    active,
    thresholds,
    values,  # [DIGITS + 1, rows] int32, out: the digits known after each step
    sums,  # [DIGITS, rows, splits, WAYS] fp32, out
    length,
    line,
    lines,
    first_width,
    step,
    KEEP_CROSSING: tl.constexpr,
    ALL: tl.constexpr,
    LINE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Step `step`: fix the digit that the step before has summed for, and sum for the next one."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    splits, rows = tl.num_programs(0), tl.num_programs(1)
    if is_active(active, row, ALL):
        value = 0
        if step > 0:
            part = tl.arange(0, SPLITS)
            source = sums + (((step - 1) * rows + row) * splits + part[:, None]) * WAYS + tl.arange(0, WAYS)[None, :]
            previous = tl.sum(tl.load(source, mask=part[:, None] < splits, other=0.0), 0)
            digit = next_digit(previous, tl.load(thresholds + row), KEEP_CROSSING)
            value = tl.load(values + (step - 1) * rows + row) | (digit << (DIGIT_BITS * (DIGITS - step)))
        if split == 0:
            tl.store(values + step * rows + row, value)
        if step < DIGITS:
            each = (lines + splits - 1) // splits
            last = tl.minimum(split * each + each, lines)
            shift = DIGIT_BITS * (DIGITS - 1 - step)
            found = sums_from(
                scores + row * length, length, line, split * each, last, first_width, value, shift, LINE_TILE, TILE
            )
            tl.store(sums + ((step * rows + row) * splits + split) * WAYS + tl.arange(0, WAYS), found)


@triton.jit(do_not_specialize=LENGTHS)
def _ties_kernel(
    scores,
    active,
    values,  # [rows] int32
    above,  # [rows, splits] int32, out
    totals,  # [rows, splits] fp32, out
    ties,  # [rows, splits] int32, out
    length,
    line,
    lines,
    first_width,
    ALL: tl.constexpr,
    LINE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count each program's items above the crossing value and equal to it."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if is_active(active, row, ALL):
        each = (lines + tl.num_programs(0) - 1) // tl.num_programs(0)
        last = tl.minimum(split * each + each, lines)
        number, total, equal = above_and_ties(
            scores + row * length, length, line, split * each, last, first_width, tl.load(values + row), LINE_TILE, TILE
        )
        target = row * tl.num_programs(0) + split
        tl.store(above + target, number)
        tl.store(totals + target, total)
        tl.store(ties + target, equal)


@triton.jit(do_not_specialize=LENGTHS)
def _cut_kernel(
    scores,
    active,
    thresholds,
    values,  # [rows] int32
    above,
    totals,
    ties,
    counts,
    cuts,
    length,
    line,
    lines,
    first_width,
    splits,
    KEEP_CROSSING: tl.constexpr,
    ALL: tl.constexpr,
    LINE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the programs' counts and find the last item that enters, in the one split that holds it."""
    row = tl.program_id(0).to(tl.int64)
    if is_active(active, row, ALL):
        part = tl.arange(0, SPLITS)
        inside = part < splits
        equal = tl.load(ties + row * splits + part, mask=inside, other=0)
        total = tl.sum(tl.load(totals + row * splits + part, mask=inside, other=0.0), 0)
        value = tl.load(values + row)
        all_ties = tl.sum(equal, 0)
        room = tl.minimum(room_for_ties(value, total, tl.load(thresholds + row), KEEP_CROSSING), all_ties)
        number = tl.sum(tl.load(above + row * splits + part, mask=inside, other=0), 0)
        tl.store(counts + row, number + room)
        before = tl.cumsum(equal, 0) - equal
        split = tl.sum((inside & (before + equal < room)).to(tl.int32), 0)
        seen = tl.sum(tl.where(part == split, before, 0), 0)
        each = (lines + splits - 1) // splits
        last = tl.minimum(split * each + each, lines)
        place = place_of_tie(
            scores + row * length, length, line, split * each, last, first_width, value, room - seen, LINE_TILE, TILE
        )
        tl.store(cuts + row, place)


def coverage(
    scores: Tensor,
    thresholds: Tensor,
    *,
    keep_crossing: bool,
    active: Tensor | None = None,
    line: int | None = None,
    first_width: int | None = None,
) -> Prefix:
    """The prefix of the largest scores that a threshold on their sum gives, lower place first among equals.

    Args:
        scores: fp32 `[rows, length]`, in [0, 2). thresholds: fp32 `[rows]`.
        keep_crossing: the shortest prefix with sum >= threshold; else the longest with sum <= threshold.
        active: int32 `[rows]`, rows with 0 are left out (their results are undefined).
        line, first_width: a row is a causal matrix with lines of `line` items, of which line I reads
            `first_width + I`; what lies behind takes no part. Default: a flat row.

    Returns:
        The prefix of each row. An item's place is its index in the row.
    """
    rows, length = scores.shape
    device = scores.device
    if line is None:
        line = first_width = LINE
    assert first_width is not None  # goes with line
    lines = cdiv(length, line)
    place = (length, line, lines, first_width)
    counts, cuts = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    tile, warps = (SHORT_TILE, SHORT_WARPS) if length <= SHORT else (TILE, WARPS)
    line_tile = min(tile, next_power_of_2(line))
    constants = {"ALL": active is None, "LINE_TILE": line_tile, "TILE": tile, "num_warps": warps}
    if active is None:
        active = counts  # not read
    with on_device(scores):
        if length <= SHORT:
            values = torch.empty_like(counts)
            _short_kernel[(rows,)](
                scores, active, thresholds, counts, values, cuts, *place, KEEP_CROSSING=keep_crossing, **constants
            )
            return Prefix(counts, values, cuts)
        splits = min(cdiv(lines, tile // line_tile), max(1, 16 * programs_at_once(device) // rows), MAX_SPLITS)
        digits = DIGITS.value
        values = torch.empty(digits + 1, rows, dtype=torch.int32, device=device)
        sums = torch.empty(digits, rows, splits, WAYS.value, dtype=torch.float32, device=device)
        above, ties = (torch.empty(rows, splits, dtype=torch.int32, device=device) for _ in range(2))
        totals = torch.empty(rows, splits, dtype=torch.float32, device=device)
        wide = next_power_of_2(splits)
        for step in range(digits + 1):
            _digit_kernel[(splits, rows)](
                scores, active, thresholds, values, sums, *place, step, KEEP_CROSSING=keep_crossing, SPLITS=wide,
                **constants,
            )  # fmt: skip
        _ties_kernel[(splits, rows)](scores, active, values[-1], above, totals, ties, *place, **constants)
        _cut_kernel[(rows,)](
            scores, active, thresholds, values[-1], above, totals, ties, counts, cuts, *place, splits,
            KEEP_CROSSING=keep_crossing, SPLITS=wide, **constants,
        )  # fmt: skip
    return Prefix(counts, values[-1], cuts)
