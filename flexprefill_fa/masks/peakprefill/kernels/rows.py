"""One program per query block: scores, shares, kept blocks and their lists.

    exact scores of the first block and of the query block's own positions
    all tiles of representatives, nearest first: z = max_i (bias_i + s q . r_i) and the running log-sum-exp of each row;
        a tile with a share near the peak is noted: the sum so far is too small, so shares are too large, and no
        other tile can hold one
    the noted tiles again, by the whole sum: blocks that reach the peak are kept

The products are R / B of dense attention's, and those of noted tiles again. A tile holds T blocks, representative i of
block b at column i T + b, so that the maximum over i stays in a thread. Notes stand at the end of the row of the full
list, whose beginning is written meanwhile: before note k is read, at most one entry for each block of the notes before
it is there, and one for the first block, and every later note has a block of its own. Scores are in units of log 2.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range
from flexprefill_fa.kernels.outputs import row_constants
from flexprefill_fa.kernels.row_lists import finish_row, row_geometry, write_blocks
from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig
from flexprefill_fa.masks.peakprefill.kernels.representatives import Representatives

NEAR = tl.constexpr(0.999)  # of the peak: slack for rounding; a sum that is not whole only makes shares larger


@triton.jit
def _joined(highest, total, scores):
    """Running maximum and sum of each row with some more scores, and their exponentials by that maximum."""
    top = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    powers = tl.exp2(scores - base[:, None])
    return top, total * tl.exp2(highest - base) + tl.sum(powers, 1), powers


@triton.jit
def _tile_scores(queries, vectors, biases, tile, factor, inside, R: tl.constexpr, T: tl.constexpr):
    """z of the blocks of a tile, `[BLOCK, T]`; minus infinity for those that are not inside."""
    row = tile * (R * T) + tl.arange(0, R * T)
    dim = tl.arange(0, queries.shape[1])
    values = tl.load(vectors + row[:, None] * queries.shape[1] + dim[None, :])  # [R T, BLOCK_D]
    products = tl.dot(queries, tl.trans(values), input_precision="tf32x3")
    scores = products * factor + tl.load(biases + row)[None, :]
    if R > 1:
        scores = tl.max(tl.reshape(scores, [queries.shape[0], R, T]), 1)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=[*LENGTHS, "last_full_blocks"])
def _rows_kernel(
    query,  # [B, Hq, q_len, D]
    key,  # [B, Hkv, kv_len, D]
    vectors,  # [B * Hkv, tiles, R, T, BLOCK_D]
    biases,  # [B * Hkv, tiles, R, T] fp32
    ranges,  # [B, 2]
    partial_counts,
    partial_indices,
    full_counts,
    full_indices,
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
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    row_first, row_last = row_geometry(start, end, row_block, offset, kv_len, BLOCK)
    target = row * q_blocks + row_block
    base = start // BLOCK
    own, own_end = tl.maximum(row_first // BLOCK, base), (row_last + BLOCK) // BLOCK  # 0 without a real query
    is_last = row_block > (end - 1 - offset) // BLOCK - last_full_blocks
    lane = tl.arange(0, T)
    written = 0
    if is_last:
        own = base  # all that it sees
    elif own_end > 0:
        token = row_block * BLOCK + tl.arange(0, BLOCK)
        position = offset + token
        real = (position >= start) & (position <= row_last)
        dim = tl.arange(0, BLOCK_D)
        query += batch * q_stride_b + head * q_stride_h
        queries = tl.load(  # [BLOCK, BLOCK_D]
            query + token.to(tl.int64)[:, None] * q_stride_l + dim[None, :],
            mask=real[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        kv_row = batch * (heads // groups) + head // groups
        keys = key + batch * k_stride_b + head // groups * k_stride_h
        vectors += kv_row * tiles * (R * T) * BLOCK_D
        biases += kv_row * tiles * (R * T)

        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        of_first = tl.where(base < own, BLOCK // KEYS, 0)
        for part in range(of_first + (own_end - own) * (BLOCK // KEYS)):
            first = tl.where(part < of_first, base * BLOCK, own * BLOCK - of_first * KEYS) + part * KEYS
            seen = first + tl.arange(0, KEYS)
            there = (seen >= start) & (seen < end)
            source = keys + seen.to(tl.int64)[:, None] * k_stride_l + dim[None, :]
            some = tl.load(source, mask=there[:, None] & (dim < D)[None, :], other=0.0)  # [KEYS, BLOCK_D]
            scores = tl.dot(queries, tl.trans(some), input_precision="tf32x3") * factor
            visible = there[None, :] & (seen[None, :] <= position[:, None])
            highest, total, _ = _joined(highest, total, tl.where(visible, scores, float("-inf")))

        note = full_indices + target * kv_blocks + kv_blocks
        noted = 0
        first_tile, tile_end = (base + 1) // T, (own + T - 1) // T
        for step in range(tile_end - first_tile):
            tile = tile_end - 1 - step
            block = tile * T + lane
            inside = (block > base) & (block < own)
            scores = _tile_scores(queries, vectors, biases, tile, factor, inside, R, T)
            highest, total, powers = _joined(highest, total, scores)
            shares = powers * tl.where(real, 1.0 / total, 0.0)[:, None]
            if tl.max(tl.max(shares, 1), 0) >= NEAR * peak:
                noted += 1
                tl.store(note - noted, tile)
        whole = highest + tl.log2(total)  # log-sum-exp
        tl.debug_barrier()  # notes are read by other threads than wrote them

        written = write_blocks(
            lane < tl.where(base < own, 1, 0), base + lane, written, start, end, row_first, target, kv_blocks,
            partial_indices, full_indices, BLOCK, ALL_PARTIAL,
        )  # fmt: skip
        for step in range(noted):
            tile = tl.load(note - noted + step)
            block = tile * T + lane
            inside = (block > base) & (block < own)
            scores = _tile_scores(queries, vectors, biases, tile, factor, inside, R, T)
            shares = tl.where(real[:, None], tl.exp2(scores - whole[:, None]), 0.0)
            written = write_blocks(
                inside & (tl.max(shares, 0) >= peak), block, written, start, end, row_first, target, kv_blocks,
                partial_indices, full_indices, BLOCK, ALL_PARTIAL,
            )  # fmt: skip
    for first in range(own, own_end, T):
        block = first + lane
        written = write_blocks(
            block < own_end, block, written, start, end, row_first, target, kv_blocks, partial_indices, full_indices,
            BLOCK, ALL_PARTIAL,
        )  # fmt: skip
    finish_row(
        written, target, kv_blocks, partial_counts, partial_indices, full_counts, full_indices, WIDTH, ZERO_TAILS
    )


def write_rows(
    query: Tensor,
    key: Tensor,
    seen: Representatives,
    ranges: Tensor,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
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
    """Warps and stages, so that queries and tiles stay within 163 KB."""
    wide = padded_dim * item_bytes
    return {"num_warps": 4 if wide < 256 else 8, "num_stages": 3 if wide <= 256 else 1}
