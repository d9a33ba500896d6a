"""One program per query block: scores, shares, kept blocks and their lists.

    c = exact log-sum-exp over the first block and those of the query block itself, per row
    look at every representative, nearest blocks first: z = max_i (bias_i + s q . r_i); l += exp(z - c);
        a block whose rows' shares come near the peak by c, which is too small a sum, is a candidate
    look at the candidates again, by the whole sum; those that reach the peak are kept

The products are R / B of dense attention's. Candidates are few, and stand in the row of the full list meanwhile, at its
end: what is written at its beginning stays behind what is read. Scores are in units of log 2.
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
from flexprefill_fa.masks.peakprefill.kernels.representatives import Representatives, count_of

LEAST = 1e-37  # of peak ** 4: fp32 holds nothing smaller


@triton.jit
def _exact_scores(keys, block, start, end, position, queries, factor, stride_l, D: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp of each query's scores with the keys that it sees of a block; minus infinity for none."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, queries.shape[0])
    real = (token >= start) & (token < end)
    source = keys + token.to(tl.int64)[:, None] * stride_l + dim[None, :]
    tile = tl.load(source, mask=real[:, None] & (dim < D)[None, :], other=0.0)  # [BLOCK, BLOCK_D]
    scores = tl.dot(tile, queries, input_precision="tf32x3") * factor  # [BLOCK, BLOCK]: keys x queries
    scores = tl.where(real[:, None] & (token[:, None] <= position[None, :]), scores, float("-inf"))
    return _log_sum(scores)


@triton.jit
def _log_sum(scores):
    """Log-sum-exp over the first dimension."""
    top = tl.max(scores, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log2(tl.sum(tl.exp2(scores - base[None, :]), 0))


@triton.jit
def _add(a, b):
    """log2(2^a + 2^b)"""
    top = tl.maximum(a, b)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log2(tl.exp2(a - base) + tl.exp2(b - base))


@triton.jit
def _scores(vectors, biases, block, inside, blocks, queries, factor, count):
    """z of some blocks, `[COLUMNS, BLOCK]`; minus infinity for those that are not inside."""
    dim = tl.arange(0, queries.shape[0])
    scores = tl.full([block.shape[0], queries.shape[1]], float("-inf"), tl.float32)
    for i in range(count):
        row = i * blocks + block
        source = vectors + row[:, None] * queries.shape[0] + dim[None, :]
        tile = tl.load(source, mask=inside[:, None], other=0.0)  # [COLUMNS, BLOCK_D]
        bias = tl.load(biases + row, mask=inside, other=float("-inf"))
        scores = tl.maximum(scores, tl.dot(tile, queries, input_precision="tf32x3") * factor + bias[:, None])
    return scores


@triton.jit
def _norms(shares):
    """Sum over the rows of the fourth powers."""
    squares = shares * shares
    return tl.sum(squares * squares, 1)


@triton.jit(do_not_specialize=[*LENGTHS, "last_full_blocks", "per_block"])
def _rows_kernel(
    query,  # [B, Hq, q_len, D]
    key,  # [B, Hkv, kv_len, D]
    vectors,  # [B * Hkv, MOST, kv_blocks, BLOCK_D]
    biases,  # [B * Hkv, MOST, kv_blocks] fp32
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
    last_full_blocks,
    per_block,
    factor,  # s log2(e)
    threshold,  # peak^4
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    lane = tl.arange(0, COLUMNS)
    scratch = full_indices + target * kv_blocks
    written = 0
    if is_last:
        for first in range(base, own_end, COLUMNS):
            block = first + lane
            written = write_blocks(
                block < own_end, block, written, start, end, row_first, target, kv_blocks, partial_indices,
                full_indices, BLOCK, ALL_PARTIAL,
            )  # fmt: skip
    elif own_end > 0:
        token = row_block * BLOCK + tl.arange(0, BLOCK)
        position = offset + token
        real = (position >= start) & (position <= row_last)
        dim = tl.arange(0, BLOCK_D)
        source = query + batch * q_stride_b + head * q_stride_h + token.to(tl.int64)[:, None] * q_stride_l
        queries = tl.load(source + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
        queries = tl.trans(queries)  # [BLOCK_D, BLOCK]
        kv_row = batch * (heads // groups) + head // groups
        keys = key + batch * k_stride_b + head // groups * k_stride_h
        vectors += kv_row * MOST * kv_blocks * BLOCK_D
        biases += kv_row * MOST * kv_blocks
        count = count_of(start, end, per_block, BLOCK)

        exact = _exact_scores(keys, own, start, end, position, queries, factor, k_stride_l, D, BLOCK)
        if own_end > own + 1:
            exact = _add(
                exact, _exact_scores(keys, own + 1, start, end, position, queries, factor, k_stride_l, D, BLOCK)
            )
        if own > base:
            exact = _add(exact, _exact_scores(keys, base, start, end, position, queries, factor, k_stride_l, D, BLOCK))
        exact = tl.where(real, exact, float("inf"))  # whose shares are then 0
        bound = exact  # c, a lower bound of the row's log-sum-exp
        sums = tl.zeros([COLUMNS, BLOCK], tl.float32)  # over the tiles
        place = kv_blocks
        for above in range(own, base + 1, -COLUMNS):
            block = above - COLUMNS + lane
            inside = block > base
            scores = _scores(vectors, biases, block, inside, kv_blocks, queries, factor, count)
            shares = tl.exp2(scores - bound[None, :])
            norms = _norms(shares)
            if not (tl.max(norms, 0) < 1e30):  # fp32 would end: the bound rises to the largest score
                rise = tl.where(real, tl.maximum(tl.max(scores - bound[None, :], 0), 0.0), 0.0)
                bound += rise
                sums *= tl.exp2(-rise)[None, :]
                shares = tl.exp2(scores - bound[None, :])
                norms = _norms(shares)
            sums += shares
            candidate = inside & (norms >= 0.999 * threshold)
            number = candidate.to(tl.int32)
            place -= tl.sum(number, 0)
            tl.store(scratch + place + tl.cumsum(number, 0) - number, block, mask=candidate)
        total = bound + tl.log2(tl.sum(sums, 0) + tl.exp2(exact - bound))
        total = tl.where(real, total, float("inf"))
        tl.debug_barrier()  # candidates are read by other threads than wrote them

        block = base + lane
        written = write_blocks(
            lane < tl.where(base < own, 1, 0), block, written, start, end, row_first, target, kv_blocks, partial_indices,
            full_indices, BLOCK, ALL_PARTIAL,
        )  # fmt: skip
        for first in range(place, kv_blocks, COLUMNS):
            inside = first + lane < kv_blocks
            block = tl.load(scratch + first + lane, mask=inside, other=0)
            scores = _scores(vectors, biases, block, inside, kv_blocks, queries, factor, count)
            keep = inside & (_norms(tl.exp2(scores - total[None, :])) >= threshold)
            written = write_blocks(
                keep, block, written, start, end, row_first, target, kv_blocks, partial_indices, full_indices, BLOCK,
                ALL_PARTIAL,
            )  # fmt: skip
        block = own + lane
        written = write_blocks(
            block < own_end, block, written, start, end, row_first, target, kv_blocks, partial_indices, full_indices,
            BLOCK, ALL_PARTIAL,
        )  # fmt: skip
    finish_row(
        written, target, kv_blocks, partial_counts, partial_indices, full_counts, full_indices, WIDTH, ZERO_TAILS
    )


def tile_options(head_dim: int, item_bytes: int) -> dict[str, int]:
    """Key blocks of a tile, warps and stages, so that queries and tiles stay within 163 KB."""
    wide = head_dim * item_bytes
    if wide <= 256:
        return {"COLUMNS": 64, "num_warps": 4, "num_stages": 2}
    return {"COLUMNS": 32 if wide <= 512 else 16, "num_warps": 8, "num_stages": 1}


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
            query, key, seen.vectors, seen.biases, ranges, *lists, *query.stride()[:3], *key.stride()[:3], batch * heads, heads,
            heads // key.shape[1], grid.offset, grid.kv_len, grid.q_blocks, grid.kv_blocks,
            min(config.last_full_blocks, grid.q_blocks), seen.per_block, scale * LOG2E, max(config.peak**4, LEAST), D=dim,
            BLOCK_D=seen.vectors.shape[1], MOST=seen.most, **row_constants(grid, all_partial, zero_tails),
            **tile_options(seen.vectors.shape[1], query.element_size()),
        )  # fmt: skip
