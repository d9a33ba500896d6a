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

from flexprefill_fa.grid import cdiv
from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, programs_at_once

DIGIT_BITS = tl.constexpr(3)
DIGITS = tl.constexpr(10)  # 30 bits: scores are probabilities, below 2
WAYS = tl.constexpr(8)
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


@triton.jit
def _is_active(active, row, ALL: tl.constexpr):
    here = tl.full([], 1, tl.int32)
    if not ALL:
        here = tl.load(active + row)
    return here != 0


@triton.jit
def _place(index, first, length, line, first_width, last_line, LINE_TILE: tl.constexpr, TILE: tl.constexpr):
    """int64 [TILE]: places of a tile that covers TILE / LINE_TILE lines from `index` on, and which take part."""
    lane = tl.arange(0, TILE)
    if LINE_TILE == TILE:
        begin = (tl.full([], 0, tl.int64) + index) * line
        width = tl.minimum(tl.minimum(line, first_width + index), length - begin).to(tl.int32)
        return begin + first + lane, first + lane < width
    row = index + lane // LINE_TILE
    column = first + lane % LINE_TILE
    place = row.to(tl.int64) * line + column
    return place, (column < tl.minimum(line, first_width + row)) & (place < length) & (row < last_line)


@triton.jit
def _sums_from(
    scores, length, line, first_line, last_line, first_width, value, shift, LINE_TILE: tl.constexpr, TILE: tl.constexpr
):
    """fp32 [WAYS]: the sums of the items of some lines whose bits are at least value | way << shift."""
    candidate = value | (tl.arange(0, WAYS) << shift)
    total = tl.zeros([WAYS, TILE], tl.float32)
    for index in range(first_line, last_line, TILE // LINE_TILE):
        for first in range(0, tl.minimum(line, first_width + index + TILE // LINE_TILE - 1), LINE_TILE):
            place, inside = _place(index, first, length, line, first_width, last_line, LINE_TILE, TILE)
            tile = tl.load(scores + place, mask=inside, other=0.0)
            total += tl.where(bits_of(tile)[None, :] >= candidate[:, None], tile[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def _next_digit(sums, goal, KEEP_CROSSING: tl.constexpr):
    """The largest digit whose sum crosses the goal; sums fall with the digit, and digit 0 is always taken."""
    if KEEP_CROSSING:
        crosses = sums >= goal
    else:
        crosses = sums > goal
    return tl.sum((crosses & (tl.arange(0, WAYS) > 0)).to(tl.int32), 0)


@triton.jit
def _above_and_ties(
    scores, length, line, first_line, last_line, first_width, value, LINE_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Number and sum of the items above the crossing value, and number of the items equal to it."""
    above = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE], tl.float32)
    ties = tl.zeros([TILE], tl.int32)
    for index in range(first_line, last_line, TILE // LINE_TILE):
        for first in range(0, tl.minimum(line, first_width + index + TILE // LINE_TILE - 1), LINE_TILE):
            place, inside = _place(index, first, length, line, first_width, last_line, LINE_TILE, TILE)
            tile = tl.load(scores + place, mask=inside, other=0.0)
            larger = (bits_of(tile) > value) & inside
            above += larger.to(tl.int32)
            total += tl.where(larger, tile, 0.0)
            ties += ((bits_of(tile) == value) & inside).to(tl.int32)
    return tl.sum(above, 0), tl.sum(total, 0), tl.sum(ties, 0)


@triton.jit
def _room(value, sum_above, goal, KEEP_CROSSING: tl.constexpr):
    """How many items equal to the crossing value enter. 0: no sum crosses, every item is in the prefix."""
    size = value.to(tl.float32, bitcast=True)
    steps = tl.minimum(tl.maximum((goal - sum_above) / tl.maximum(size, 1e-45), 0.0), 2147483000.0)
    room = (tl.math.ceil(steps) if KEEP_CROSSING else tl.math.floor(steps)).to(tl.int32)
    if KEEP_CROSSING:
        room = tl.maximum(room, 1)
    return tl.where(value == 0, 2147483000, room)


@triton.jit
def _place_of_tie(
    scores, length, line, first_line, last_line, first_width, value, number, LINE_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Place of the number-th item (from 1) equal to value, -1 for number 0, of the last one if there are fewer."""
    found = -1
    seen = 0
    index = first_line
    while (index < last_line) & (seen < number):
        for first in range(0, tl.minimum(line, first_width + index + TILE // LINE_TILE - 1), LINE_TILE):
            place, inside = _place(index, first, length, line, first_width, last_line, LINE_TILE, TILE)
            tile = tl.load(scores + place, mask=inside, other=0.0)
            tie = (bits_of(tile) == value) & inside
            rank = seen + tl.cumsum(tie.to(tl.int32), 0)
            found = tl.maximum(found, tl.max(tl.where(tie & (rank <= number), place.to(tl.int32), -1), 0))
            seen += tl.sum(tie.to(tl.int32), 0)
        index += TILE // LINE_TILE
    return found


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
    if _is_active(active, row, ALL):
        goal = tl.load(thresholds + row)
        scores += row * length
        value = 0
        for digit in range(DIGITS):
            shift = DIGIT_BITS * (DIGITS - 1 - digit)
            sums = _sums_from(scores, length, line, 0, lines, first_width, value, shift, LINE_TILE, TILE)
            value |= _next_digit(sums, goal, KEEP_CROSSING) << shift
        above, total, ties = _above_and_ties(scores, length, line, 0, lines, first_width, value, LINE_TILE, TILE)
        room = tl.minimum(_room(value, total, goal, KEEP_CROSSING), ties)
        tl.store(counts + row, above + room)
        tl.store(values + row, value)
        tl.store(cuts + row, _place_of_tie(scores, length, line, 0, lines, first_width, value, room, LINE_TILE, TILE))


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
    if _is_active(active, row, ALL):
        value = 0
        if step > 0:
            part = tl.arange(0, SPLITS)
            source = sums + (((step - 1) * rows + row) * splits + part[:, None]) * WAYS + tl.arange(0, WAYS)[None, :]
            previous = tl.sum(tl.load(source, mask=part[:, None] < splits, other=0.0), 0)
            digit = _next_digit(previous, tl.load(thresholds + row), KEEP_CROSSING)
            value = tl.load(values + (step - 1) * rows + row) | (digit << (DIGIT_BITS * (DIGITS - step)))
        if split == 0:
            tl.store(values + step * rows + row, value)
        if step < DIGITS:
            each = (lines + splits - 1) // splits
            last = tl.minimum(split * each + each, lines)
            shift = DIGIT_BITS * (DIGITS - 1 - step)
            found = _sums_from(
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
    if _is_active(active, row, ALL):
        each = (lines + tl.num_programs(0) - 1) // tl.num_programs(0)
        last = tl.minimum(split * each + each, lines)
        number, total, equal = _above_and_ties(
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
    if _is_active(active, row, ALL):
        part = tl.arange(0, SPLITS)
        inside = part < splits
        equal = tl.load(ties + row * splits + part, mask=inside, other=0)
        total = tl.sum(tl.load(totals + row * splits + part, mask=inside, other=0.0), 0)
        value = tl.load(values + row)
        all_ties = tl.sum(equal, 0)
        room = tl.minimum(_room(value, total, tl.load(thresholds + row), KEEP_CROSSING), all_ties)
        number = tl.sum(tl.load(above + row * splits + part, mask=inside, other=0), 0)
        tl.store(counts + row, number + room)
        before = tl.cumsum(equal, 0) - equal
        split = tl.sum((inside & (before + equal < room)).to(tl.int32), 0)
        seen = tl.sum(tl.where(part == split, before, 0), 0)
        each = (lines + splits - 1) // splits
        last = tl.minimum(split * each + each, lines)
        place = _place_of_tie(
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
    line_tile = min(tile, triton.next_power_of_2(line))
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
        wide = triton.next_power_of_2(splits)
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
