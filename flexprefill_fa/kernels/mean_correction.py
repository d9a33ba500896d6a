"""Dropped blocks by their summaries, merged into attention over the kept ones by log-sum-exp.

numerator   += sum_J exp(bias_J + s q . K_J) V_J        J: dropped by q's row block, last real key visible to q
denominator += sum_J exp(bias_J + s q . K_J)
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import cdiv, next_power_of_2
from flexprefill_fa.kernels.block_summaries import summaries
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range, unit_stride
from flexprefill_fa.kernels.kept_map import kept_map
from flexprefill_fa.kernels.outputs import prepare


@triton.jit
def _add_summaries(
    sums,  # [ROWS, BLOCK_D] fp32: weighted values so far
    total,  # [ROWS] fp32: weights so far
    base,  # [ROWS] fp32: weights are 2 ** (score - base); ONLINE raises it as scores require
    q,  # [ROWS, BLOCK_D]
    mean_key,  # of this head, [kv_blocks, D]
    mean_value,
    bias,  # of this head, [kv_blocks] fp32, to base 2
    kept,  # of this row block, [kv_blocks]
    q_position,
    row_first,
    row_end,
    start,
    end,
    kv_blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Sums and total with the dropped blocks' summaries, and the highest of their scores."""
    dim = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, COLUMNS)
    highest = tl.full(base.shape, float("-inf"), tl.float32)
    whole = (row_first + 1) // BLOCK  # every row sees the blocks before it
    begin = start // BLOCK
    # Loaded one tile ahead: a value that a tile waits for costs as much as its products.
    flag = tl.load(kept + begin + lane, mask=begin + lane < kv_blocks, other=1)
    weight = tl.load(bias + begin + lane, mask=begin + lane < kv_blocks, other=float("-inf"))
    for first in tl.range(begin, row_end // BLOCK + 1, COLUMNS, num_stages=STAGES):
        block = first + lane
        added = tl.where(flag == 0, weight, float("-inf"))
        flag = tl.load(kept + block + COLUMNS, mask=block + COLUMNS < kv_blocks, other=1)
        weight = tl.load(bias + block + COLUMNS, mask=block + COLUMNS < kv_blocks, other=float("-inf"))
        place = block[:, None] * D + dim[None, :]
        inside = (block < kv_blocks)[:, None] & (dim < D)[None, :]
        keys = tl.load(mean_key + place, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale + added[None, :]
        if (first + COLUMNS > whole) | (first * BLOCK < start):  # rarely, for it is work per column in every thread
            count = tl.minimum(end, block * BLOCK + BLOCK) - tl.maximum(start, block * BLOCK)
            # The last real key of a block must be visible: position min(end, (J + 1) B) - 1.
            bound = tl.where(count > 0, tl.minimum(end, block * BLOCK + BLOCK) - 1, 2147483647)
            scores = tl.where(bound[None, :] <= q_position[:, None], scores, float("-inf"))
        highest = tl.maximum(highest, tl.max(scores, 1))
        finite = base
        if ONLINE:
            higher = tl.maximum(base, highest)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(base - finite)
            total = total * shrink
            sums = sums * shrink[:, None]
            base = higher
        weights = tl.exp2(scores - finite[:, None])
        total += tl.sum(weights, 1)
        values = tl.load(mean_value + place, mask=inside, other=0.0)
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="tf32x3")
    return sums, total, highest


@triton.jit
def _correct_piece(
    query,  # of these rows, as out and result
    out,
    result,
    lse,
    mean_key,
    mean_value,
    bias,
    kept,
    q_stride_l,
    o_stride_l,
    r_stride_l,
    rows,  # that there are, at most ROWS
    row_first,
    start,
    end,
    kv_blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    LIMIT: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Correct ROWS queries; above 0 where their weights went too high and ONLINE must do them again."""
    item = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    stored = (item < rows)[:, None] & (dim < D)[None, :]
    q = tl.load(query + item[:, None] * q_stride_l + dim[None, :], mask=stored, other=0.0)
    norm = tl.load(lse + item, mask=item < rows, other=float("-inf"))
    normal = norm > float("-inf")  # a row that sees no kept key has no norm, minus infinity or NaN
    base = tl.where(normal, norm * 1.4426950408889634, float("-inf") if ONLINE else 0.0)
    main = out + item[:, None] * o_stride_l + dim[None, :]
    sums = tl.load(main, mask=stored & normal[:, None], other=0.0).to(tl.float32)
    position = row_first + item
    sums, total, highest = _add_summaries(
        sums, normal.to(tl.float32), base, q, mean_key, mean_value, bias, kept, position, row_first,
        tl.minimum(row_first + ROWS, end), start, end, kv_blocks, scale, D, BLOCK_D, BLOCK, COLUMNS, STAGES, ONLINE,
    )  # fmt: skip
    merged = (sums / tl.where(total > 0, total, 1.0)[:, None]).to(result.dtype.element_ty)
    tl.store(result + item[:, None] * r_stride_l + dim[None, :], merged, mask=stored)
    # Without a norm there is nothing for weights to be relative to; padded rows mean nothing anyway.
    astray = (normal == 0) & (position >= start) & (position < end) & (highest > float("-inf"))
    return tl.max((astray | (highest - base > LIMIT)).to(tl.int32), 0)


@triton.jit(do_not_specialize=[*LENGTHS, "pieces"])
def _correct_kernel(
    query,
    mean_key,  # [B, H', kv_blocks, D], query's dtype; H' as `groups` says
    mean_value,
    bias,  # [B, H', kv_blocks] fp32, to base 2
    kept,  # [B * Hq, q_blocks, kv_blocks] int8
    ranges,
    out,  # [B, Hq, q_len, D]: attention over the kept blocks
    lse,  # [B * Hq, q_len] fp32: its log-sum-exp, natural logarithm
    result,  # [B, Hq, q_len, D], out
    q_stride_b,
    q_stride_h,
    q_stride_l,
    o_stride_b,
    o_stride_h,
    o_stride_l,
    r_stride_b,
    r_stride_h,
    r_stride_l,
    pieces,  # of ROWS queries
    heads,
    groups,  # query heads that share a summary
    q_len,
    offset,
    q_blocks,
    kv_blocks,
    scale,  # times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """One program per ROWS queries of a head; the heaviest, the last ones, first.

    The norm of the attention over the kept blocks is known, so weights are relative to it: the sums begin with `out`
    at weight 1, and no running maximum rescales them. Where a dropped block outweighs all kept ones by 2 ** LIMIT, or
    nothing is kept, which is rare, the piece is made again with one (ONLINE).
    """
    line = tl.program_id(0)
    row = (line // pieces).to(tl.int64)
    first_row = (pieces - 1 - line % pieces) * ROWS
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    kv_row = (batch * (heads // groups) + head // groups) * kv_blocks
    query += batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_l
    out += batch * o_stride_b + head * o_stride_h + first_row.to(tl.int64) * o_stride_l
    result += batch * r_stride_b + head * r_stride_h + first_row.to(tl.int64) * r_stride_l
    lse += row * q_len + first_row
    mean_key += kv_row * D
    mean_value += kv_row * D
    bias += kv_row
    kept += (row * q_blocks + first_row // BLOCK) * kv_blocks
    again = _correct_piece(
        query, out, result, lse, mean_key, mean_value, bias, kept, q_stride_l, o_stride_l, r_stride_l,
        q_len - first_row, offset + first_row, start, end, kv_blocks, scale, D, BLOCK_D, BLOCK, ROWS, COLUMNS, STAGES,
        LIMIT, False,
    )  # fmt: skip
    if again > 0:
        for half in range(2):  # what a running maximum takes in registers would not fit beside all of them
            first = half * (ROWS // 2)
            _correct_piece(
                query + first * q_stride_l, out + first * o_stride_l, result + first * r_stride_l, lse + first,
                mean_key, mean_value, bias, kept, q_stride_l, o_stride_l, r_stride_l, q_len - first_row - first,
                offset + first_row + first, start, end, kv_blocks, scale, D, BLOCK_D, BLOCK, ROWS // 2, COLUMNS, 1,
                LIMIT, True,
            )  # fmt: skip


def launch_options(head_dim: int, block_size: int) -> dict[str, int]:
    """Queries and columns of a tile, pipeline stages and warps: two programs per multiprocessor at D = 128."""
    if head_dim <= 128:
        return {"ROWS": min(128, block_size), "COLUMNS": 32, "STAGES": 2, "num_warps": 4}
    return {"ROWS": 64, "COLUMNS": 32, "STAGES": 1, "num_warps": 4}


def correct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    block_size: int,
    tilted: bool = False,
) -> Tensor:
    """`out` `[B, Hq, Lq, D]` with the summaries of dropped blocks; lse `[B, Hq, Lq]` in natural logarithms."""
    query, key, grid, ranges = prepare(query, key, starts, lengths, block_size)
    value, out, lse = unit_stride(value), unit_stride(out), lse.contiguous()
    batch, heads, q_len, dim = query.shape
    found = summaries(query, key, value, ranges, grid, scale, tilted)
    result = torch.empty_like(out)
    options = launch_options(dim, block_size)
    pieces = cdiv(q_len, options["ROWS"])
    kept = kept_map(lists, grid)
    with on_device(query):
        _correct_kernel[(batch * heads * pieces,)](
            query, *found, kept, ranges, out, lse, result, *query.stride()[:3], *out.stride()[:3],
            *result.stride()[:3], pieces, heads, heads // found[0].shape[1], q_len, grid.offset, grid.q_blocks,
            grid.kv_blocks, scale * LOG2E, D=dim, BLOCK_D=max(16, next_power_of_2(dim)), BLOCK=block_size,
            LIMIT=14 if query.dtype == torch.float16 else 100, **options,
        )  # fmt: skip
    return result
