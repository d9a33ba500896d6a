"""Dropped blocks by their means, merged into attention over the kept ones by log-sum-exp.

numerator   += sum_J |B_J| exp(s q . K_[J]) V_[J]        J: dropped by q's row block, last real key visible to q
denominator += sum_J |B_J| exp(s q . K_[J])
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range, unit_stride
from flexprefill_fa.kernels.outputs import prepare
from flexprefill_fa.kernels.pooling import block_mean

CHUNK = 512  # index entries at a time


@triton.jit(do_not_specialize=LENGTHS)
def _kept_map_kernel(
    partial_counts,  # [rows, q_blocks] int32
    partial_indices,  # [rows, q_blocks, width] int32
    full_counts,
    full_indices,
    kept,  # [rows, q_blocks, kv_blocks] int8, zeros; out: 1 where a block is kept
    width,
    kv_blocks,
    CHUNK: tl.constexpr,
):
    target = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    ones = tl.full([CHUNK], 1, tl.int8)
    for kind in tl.static_range(2):
        count = tl.load((partial_counts if kind == 0 else full_counts) + target)
        indices = partial_indices if kind == 0 else full_indices
        for first in range(0, count, CHUNK):
            inside = first + lane < count
            block = tl.load(indices + target * width + first + lane, mask=inside, other=0)
            tl.store(kept + target * kv_blocks + block, ones, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _correct_kernel(
    query,
    mean_key,  # [B, Hkv, kv_blocks, D], query's dtype
    mean_value,  # [B, Hkv, kv_blocks, D], query's dtype
    kept,  # [rows, q_blocks, kv_blocks] int8
    ranges,
    out,  # [B, Hq, q_len, D]: attention over the kept blocks
    lse,  # [rows, q_len] fp32: its log-sum-exp, natural logarithm
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
    heads,
    groups,
    q_len,
    offset,
    kv_blocks,
    scale,  # times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per row block and head; the heaviest rows, the last ones, first."""
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    q_index = row_block * BLOCK + tl.arange(0, BLOCK)
    q_position = offset + q_index
    dim = tl.arange(0, BLOCK_D)
    inside = (q_index < q_len)[:, None] & (dim < D)[None, :]
    place = q_index.to(tl.int64)[:, None]
    q = tl.load(
        query + batch * q_stride_b + head * q_stride_h + place * q_stride_l + dim[None, :], mask=inside, other=0.0
    )
    means = (batch * (heads // groups) + head // groups) * kv_blocks * D
    kept += (row * tl.num_programs(0) + row_block) * kv_blocks
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    last = tl.minimum(offset + row_block * BLOCK + BLOCK, end)  # past the last position that these rows see
    for first in range(start // BLOCK, last // BLOCK + 1, COLUMNS):
        block = first + tl.arange(0, COLUMNS)
        count = tl.minimum(end, block * BLOCK + BLOCK) - tl.maximum(start, block * BLOCK)
        here = (block < kv_blocks) & (count > 0)
        dropped = here & (tl.load(kept + block, mask=here, other=1) == 0)
        # The last real key of a block must be visible: position min(end, (J + 1) B) - 1.
        bound = tl.where(dropped, tl.minimum(end, block * BLOCK + BLOCK) - 1, 2147483647)
        keys = tl.load(
            mean_key + means + block[:, None] * D + dim[None, :], mask=here[:, None] & (dim < D)[None, :], other=0.0
        )
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
        scores += tl.log2(tl.maximum(count, 1).to(tl.float32))[None, :]
        scores = tl.where(bound[None, :] <= q_position[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(highest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            mean_value + means + block[:, None] * D + dim[None, :], mask=here[:, None] & (dim < D)[None, :], other=0.0
        )
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="tf32x3")
        highest = higher
    main = tl.load(out + batch * o_stride_b + head * o_stride_h + place * o_stride_l + dim[None, :], mask=inside)
    norm = tl.load(lse + row * q_len + q_index, mask=q_index < q_len, other=0.0) * 1.4426950408889634
    # A row that sees no key at all has no norm, and no correction either.
    base = tl.maximum(tl.where(norm == norm, norm, float("-inf")), highest)
    base = tl.where(base == float("-inf"), 0.0, base)
    own, share = tl.exp2(norm - base), tl.exp2(highest - base)
    merged = (main.to(tl.float32) * own[:, None] + sums * share[:, None]) / (own + total * share)[:, None]
    merged = tl.where((highest == float("-inf"))[:, None], main.to(tl.float32), merged)
    tl.store(
        result + batch * r_stride_b + head * r_stride_h + place * r_stride_l + dim[None, :],
        merged.to(result.dtype.element_ty),
        mask=inside,
    )


def kept_map(lists: tuple[Tensor, Tensor, Tensor, Tensor], grid: Grid) -> Tensor:
    """int8 `[B, Hq, nq, nk]`: 1 where a block is kept."""
    batch, heads, q_blocks = lists[0].shape
    kept = torch.zeros(batch, heads, q_blocks, grid.kv_blocks, dtype=torch.int8, device=lists[0].device)
    with on_device(kept):
        _kept_map_kernel[(q_blocks, batch * heads)](*lists, kept, lists[1].shape[-1], grid.kv_blocks, CHUNK=CHUNK)
    return kept


def launch_options(head_dim: int) -> dict[str, int]:
    """Columns of a tile, warps and stages."""
    small = head_dim <= 128
    return {"COLUMNS": 64 if small else 32, "num_warps": 8, "num_stages": 2 if small else 1}


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
) -> Tensor:
    """`out` `[B, Hq, Lq, D]` with the means of dropped blocks; lse `[B, Hq, Lq]` in natural logarithms."""
    query, key, grid, ranges = prepare(query, key, starts, lengths, block_size)
    value, out, lse = unit_stride(value), unit_stride(out), lse.contiguous()
    batch, heads, q_len, dim = query.shape
    means = [block_mean(x, ranges, 0, block_size).to(query.dtype) for x in (key, value)]
    result = torch.empty_like(out)
    with on_device(query):
        _correct_kernel[(grid.q_blocks, batch * heads)](
            query, *means, kept_map(lists, grid), ranges, out, lse, result, *query.stride()[:3], *out.stride()[:3],
            *result.stride()[:3], heads, heads // key.shape[1], q_len, grid.offset, grid.kv_blocks, scale * LOG2E,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK=block_size, **launch_options(dim),
        )  # fmt: skip
    return result
