"""Device functions of the coverage search: sums, counts and places of the items of some lines of a row.

A row of scores is a matrix of lines, of which line I takes part with its first `first_width + I` items; a flat row is
a matrix of equal lines. Programs read it in tiles of TILE items, which cover TILE / LINE_TILE lines at once.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from flexprefill_fa.kernels.common import bits_of

DIGIT_BITS = tl.constexpr(3)
DIGITS = tl.constexpr(10)  # 30 bits: scores are probabilities, below 2
WAYS = tl.constexpr(8)


@triton.jit
def is_active(active, row, ALL: tl.constexpr):
    """Whether a row is to be searched; all are where ALL."""
    here = tl.full([], 1, tl.int32)
    if not ALL:
        here = tl.load(active + row)
    return here != 0


@triton.jit
def tile_places(index, first, length, line, first_width, last_line, LINE_TILE: tl.constexpr, TILE: tl.constexpr):
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
def sums_from(
    scores, length, line, first_line, last_line, first_width, value, shift, LINE_TILE: tl.constexpr, TILE: tl.constexpr
):
    """fp32 [WAYS]: the sums of the items of some lines whose bits are at least value | way << shift."""
    candidate = value | (tl.arange(0, WAYS) << shift)
    total = tl.zeros([WAYS, TILE], tl.float32)
    for index in range(first_line, last_line, TILE // LINE_TILE):
        for first in range(0, tl.minimum(line, first_width + index + TILE // LINE_TILE - 1), LINE_TILE):
            place, inside = tile_places(index, first, length, line, first_width, last_line, LINE_TILE, TILE)
            tile = tl.load(scores + place, mask=inside, other=0.0)
            total += tl.where(bits_of(tile)[None, :] >= candidate[:, None], tile[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def next_digit(sums, threshold, KEEP_CROSSING: tl.constexpr):
    """The largest digit whose sum crosses the threshold; sums fall with the digit, and digit 0 is always taken."""
    if KEEP_CROSSING:
        crosses = sums >= threshold
    else:
        crosses = sums > threshold
    return tl.sum((crosses & (tl.arange(0, WAYS) > 0)).to(tl.int32), 0)


@triton.jit
def above_and_ties(
    scores, length, line, first_line, last_line, first_width, value, LINE_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Number and sum of the items above the crossing value, and number of the items equal to it."""
    above = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE], tl.float32)
    ties = tl.zeros([TILE], tl.int32)
    for index in range(first_line, last_line, TILE // LINE_TILE):
        for first in range(0, tl.minimum(line, first_width + index + TILE // LINE_TILE - 1), LINE_TILE):
            place, inside = tile_places(index, first, length, line, first_width, last_line, LINE_TILE, TILE)
            tile = tl.load(scores + place, mask=inside, other=0.0)
            larger = (bits_of(tile) > value) & inside
            above += larger.to(tl.int32)
            total += tl.where(larger, tile, 0.0)
            ties += ((bits_of(tile) == value) & inside).to(tl.int32)
    return tl.sum(above, 0), tl.sum(total, 0), tl.sum(ties, 0)


@triton.jit
def room_for_ties(value, sum_above, threshold, KEEP_CROSSING: tl.constexpr):
    """How many items equal to the crossing value enter. 0: no sum crosses, every item is in the prefix."""
    size = value.to(tl.float32, bitcast=True)
    steps = tl.minimum(tl.maximum((threshold - sum_above) / tl.maximum(size, 1e-45), 0.0), 2147483000.0)
    room = (tl.math.ceil(steps) if KEEP_CROSSING else tl.math.floor(steps)).to(tl.int32)
    if KEEP_CROSSING:
        room = tl.maximum(room, 1)
    return tl.where(value == 0, 2147483000, room)


@triton.jit
def place_of_tie(
    scores, length, line, first_line, last_line, first_width, value, number, LINE_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Place of the number-th item (from 1) equal to value, -1 for number 0, of the last one if there are fewer."""
    found = -1
    seen = 0
    index = first_line
    while (index < last_line) & (seen < number):
        for first in range(0, tl.minimum(line, first_width + index + TILE // LINE_TILE - 1), LINE_TILE):
            place, inside = tile_places(index, first, length, line, first_width, last_line, LINE_TILE, TILE)
            tile = tl.load(scores + place, mask=inside, other=0.0)
            tie = (bits_of(tile) == value) & inside
            rank = seen + tl.cumsum(tie.to(tl.int32), 0)
            found = tl.maximum(found, tl.max(tl.where(tie & (rank <= number), place.to(tl.int32), -1), 0))
            seen += tl.sum(tie.to(tl.int32), 0)
        index += TILE // LINE_TILE
    return found
