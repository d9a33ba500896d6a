"""One program per query block: scores, shares, kept blocks and their lists.

    exact scores of the first block and of the query block's own positions
    all tiles of representatives, nearest first: z = max_i (bias_i + s q . r_i) and the running log-sum-exp of each row;
        a tile with a share near the peak is noted: the sum so far is too small, so shares are too large, and no
        other tile can hold one. Each row keeps notes as bits, joined once in 32 tiles: warps need not wait in between
    the noted tiles again, by the whole sum: blocks that reach the peak are kept

The products are R / B of dense attention's, and those of noted tiles again. A tile holds T blocks, representative i of
block b at column i T + b, so that the maximum over i stays in a thread. Notes stand at the end of the lists' row, whose
beginning is written meanwhile: before note k is read, a list has at most one entry for each block of the notes before
it and one for the first block, of the nk that it has room for, and every later note has a block of its own. Scores are
in units of log 2.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range
from flexprefill_fa.kernels.outputs import row_constants
from flexprefill_fa.kernels.row_lists import (
    finish_row,
    list_row,
    row_geometry,
    write_block,
    write_blocks,
    write_whole_blocks,
)
from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig
from flexprefill_fa.masks.peakprefill.kernels.representatives import Representatives

WORD = tl.constexpr(32)  # tiles whose notes a row keeps as bits
LEAST = tl.constexpr(-3e38)  # below all scores, and finite
NEAR = tl.constexpr(0.999)  # of the peak: slack for rounding; a sum that is not whole only makes shares larger


@triton.jit
def _or(one, other):
    return one | other


@triton.jit
def _tile_scores(queries, vectors, biases, tile, factor, inside, R: tl.constexpr, T: tl.constexpr):
    """z of the blocks of a tile, `[ROWS, T]`; minus infinity for those that are not inside."""
    row = tile * (R * T) + tl.arange(0, R * T)
    dim = tl.arange(0, queries.shape[1])
    values = tl.load(vectors + row[:, None] * queries.shape[1] + dim[None, :])  # [R T, BLOCK_D]
    products = tl.dot(queries, tl.trans(values), input_precision="tf32x3")
    scores = products * factor + tl.load(biases + row)[None, :]
    if R > 1:
        scores = tl.max(tl.reshape(scores, [queries.shape[0], R, T]), 1)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _exact_sums(
    queries,  # [ROWS, BLOCK_D]
    position,  # [ROWS]
    keys,
    k_stride_l,
    start,
    end,
    base,
    own,
    own_end,
    factor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Maximum of the exact scores of each row, and the sum of exponentials by it: of the first block and its own."""
    dim = tl.arange(0, queries.shape[1])
    highest = tl.full([queries.shape[0]], LEAST, tl.float32)
    total = tl.zeros([queries.shape[0]], tl.float32)
    of_first = tl.where(base < own, BLOCK // KEYS, 0)
    for part in range(of_first + (own_end - own) * (BLOCK // KEYS)):
        first = tl.where(part < of_first, base * BLOCK, own * BLOCK - of_first * KEYS) + part * KEYS
        seen = first + tl.arange(0, KEYS)
        there = (seen >= start) & (seen < end)
        source = keys + seen.to(tl.int64)[:, None] * k_stride_l + dim[None, :]
        some = tl.load(source, mask=there[:, None] & (dim < D)[None, :], other=0.0)  # [KEYS, BLOCK_D]
        scores = tl.dot(queries, tl.trans(some), input_precision="tf32x3") * factor
        visible = there[None, :] & (seen[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - top) + tl.sum(tl.exp2(scores - top[:, None]), 1)
        highest = top
    return highest, total


@triton.jit(do_not_specialize=[*LENGTHS, "last_full_blocks"])
def _rows_kernel(
    query,  # [B, Hq, q_len, D]
    key,  # [B, Hkv, kv_len, D]
    vectors,  # [B * Hkv, tiles, R, T, BLOCK_D]
    biases,  # [B * Hkv, tiles, R, T] fp32
    ranges,  # [B, 2]
    partial_counts,
    full_counts,
    indices,  # [B * Hq, q_blocks, PARTIAL + kv_blocks]
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    all_rows,  # B * Hq
    heads,
    groups,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    tiles,
    last_full_blocks,
    factor,  # s log2(e)
    peak,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_PARTIAL: tl.constexpr,
    ZERO_TAILS: tl.constexpr,
):
    # The last query blocks come first: they take longest.
    row_block = q_blocks - 1 - tl.program_id(0) // all_rows
    row = (tl.program_id(0) % all_rows).to(tl.int64)
    target = row * q_blocks + row_block
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    base = start // BLOCK
    own, own_end = tl.maximum(row_first // BLOCK, base), (row_last + BLOCK) // BLOCK  # 0 without a real query
    is_last = row_block > (end - 1 - offset) // BLOCK - last_full_blocks
    if is_last:
        own = base  # all that it sees
    lane, dim = tl.arange(0, T), tl.arange(0, BLOCK_D)
    query += batch * q_stride_b + head * q_stride_h
    kv_row = batch * (heads // groups) + head // groups
    vectors += kv_row * tiles * (R * T) * BLOCK_D
    biases += kv_row * tiles * (R * T)
    written = 0
    if (own_end > 0) & (base < own):
        written = write_block(base, written, start, end, row_first, target, kv_blocks, indices, BLOCK, ALL_PARTIAL)
    if (own_end > 0) & (base + 1 < own):  # there are blocks to decide on
        position = row_first + tl.arange(0, BLOCK)
        real = (position >= start) & (position <= row_last)
        place = (position - offset).to(tl.int64) * q_stride_l
        there = real[:, None] & (dim < D)[None, :]
        queries = tl.load(query + place[:, None] + dim[None, :], mask=there, other=0.0)  # [BLOCK, BLOCK_D]
        keys = key + batch * k_stride_b + head // groups * k_stride_h
        highest, total = _exact_sums(
            queries, position, keys, k_stride_l, start, end, base, own, own_end, factor, D, BLOCK, KEYS
        )
        note = list_row(indices, target + 1, kv_blocks)
        noted = 0
        first_tile, tile_end = (base + 1) // T, (own + T - 1) // T
        for last in range(tile_end - 1, first_tile - 1, -WORD):
            hits = tl.zeros([BLOCK], tl.int32)
            count = tl.minimum(last - first_tile + 1, WORD)
            for step in range(count):
                block = (last - step) * T + lane
                inside = (block > base) & (block < own)
                scores = _tile_scores(queries, vectors, biases, last - step, factor, inside, R, T)
                here = tl.max(scores, 1)
                top = tl.maximum(highest, here)
                total = total * tl.exp2(highest - top) + tl.sum(tl.exp2(scores - top[:, None]), 1)
                highest = top
                hits |= (tl.exp2(here - top) >= total * (NEAR * peak)).to(tl.int32) << step
            word = tl.reduce(tl.where(real, hits, 0), 0, _or)
            for step in range(count):
                if (word >> step) & 1:
                    noted += 1
                    tl.store(note - noted, last - step)
        whole = tl.where(real, highest + tl.log2(total), float("inf"))  # log-sum-exp
        tl.debug_barrier()  # notes are read by other threads than wrote them

        for step in range(noted):
            tile = tl.load(note - noted + step)
            block = tile * T + lane
            inside = (block > base) & (block < own)
            shares = tl.exp2(_tile_scores(queries, vectors, biases, tile, factor, inside, R, T) - whole[:, None])
            written = write_whole_blocks(
                inside & (tl.max(shares, 0) >= peak), block, written, target, kv_blocks, indices, ALL_PARTIAL
            )
    if is_last:
        for first in range(own, own_end, T):
            block = first + lane
            written = write_blocks(
                block < own_end, block, written, start, end, row_first, target, kv_blocks, indices, BLOCK, ALL_PARTIAL,
            )  # fmt: skip
    else:
        for block in range(own, own_end):
            written = write_block(block, written, start, end, row_first, target, kv_blocks, indices, BLOCK, ALL_PARTIAL)
    finish_row(written, target, kv_blocks, partial_counts, full_counts, indices, WIDTH, ZERO_TAILS)


def write_rows(
    query: Tensor,
    key: Tensor,
    seen: Representatives,
    ranges: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    config: PeakPrefillConfig,
    scale: float,
    *,
    all_partial: bool,
    zero_tails: bool,
) -> None:
    """Fill the lists. query and key with unit stride in D."""
    batch, heads, _, dim = query.shape
    with on_device(query):
        _rows_kernel[(grid.q_blocks * batch * heads,)](
            query, key, seen.vectors, seen.biases, ranges, *lists, *query.stride()[:3], *key.stride()[:3],
            batch * heads, heads, heads // key.shape[1], grid.offset, grid.kv_len, grid.q_blocks, grid.kv_blocks,
            seen.tiles, min(config.last_full_blocks, grid.q_blocks), scale * LOG2E, config.peak, D=dim,
            BLOCK_D=seen.vectors.shape[1], R=seen.most, T=seen.width // seen.most, KEYS=seen.width,
            **row_constants(grid, all_partial, zero_tails),
            **launch_options(seen.vectors.shape[1], query.element_size()),
        )  # fmt: skip


def launch_options(padded_dim: int, item_bytes: int) -> dict[str, int]:
    """Warps, stages and registers of a thread, so that queries and tiles stay within 163 KB.

    80 registers let three programs of 8 warps share an SM of Hopper, which is worth more than a third stage. Rows of 64
    dimensions fit 4 warps, which is 6 % faster from 32K tokens on and the same at 8K.
    """
    wide = padded_dim * item_bytes
    if item_bytes == 4:
        return {"num_warps": 4 if wide < 256 else 8, "num_stages": 3 if wide <= 256 else 1}
    if wide <= 128:
        return {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
    return {"num_warps": 8, "num_stages": 2, "maxnreg": 80} if wide <= 256 else {"num_warps": 8, "num_stages": 1}
