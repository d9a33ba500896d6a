"""`block_summaries.summaries` in Triton."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range
from flexprefill_fa.kernels.pooling import block_mean


@triton.jit(do_not_specialize=LENGTHS)
def _later_kernel(
    means,  # [B, H, q_blocks, D] fp32, of each block's real queries
    ranges,
    later,  # [B, H, q_blocks + 1, D] fp32, out: of all real queries from a block on; 0 behind the last
    heads,
    offset,
    q_blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per head goes from its last block to its first."""
    row = tl.program_id(0).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    dim = tl.arange(0, BLOCK_D)
    within = (dim < D)[None, :]
    means += row * q_blocks * D
    later += row * (q_blocks + 1) * D
    tl.store(later + q_blocks * D + dim, tl.zeros([BLOCK_D], tl.float32), mask=dim < D)
    behind = tl.zeros([BLOCK_D], tl.float32)  # sum of the queries of later tiles
    counted = 0.0
    for tile in range(0, tl.cdiv(q_blocks, ROWS)):
        block = q_blocks - (tile + 1) * ROWS + tl.arange(0, ROWS)
        first = offset + block * BLOCK
        count = tl.minimum(end, first + BLOCK) - tl.maximum(start, first)
        count = tl.where(block >= 0, tl.maximum(count, 0), 0).to(tl.float32)
        place = block[:, None] * D + dim[None, :]
        held = (block >= 0)[:, None] & within
        sums = tl.load(means + place, mask=held, other=0.0) * count[:, None]
        total = tl.cumsum(sums, 0, reverse=True) + behind[None, :]
        number = tl.cumsum(count, 0, reverse=True) + counted
        tl.store(later + place, total / tl.maximum(number, 1.0)[:, None], mask=held)
        behind += tl.sum(sums, 0)
        counted += tl.sum(count, 0)


@triton.jit(do_not_specialize=LENGTHS)
def _summary_kernel(
    key,
    value,
    ranges,
    later,  # of `_later_kernel`; not read unless TILTED
    keys,  # [B, H', kv_blocks, D], out, as values; H' is the number of query heads where TILTED, else of key heads
    values,
    bias,  # [B, H', kv_blocks] fp32, out: to base 2
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    kv_heads,
    passes,  # query heads of a key head where TILTED, else 1
    kv_len,
    kv_blocks,
    q_blocks,
    first_block,  # key block of query 0
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILTED: tl.constexpr,
):
    """One program per key block of a key head."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    start, end = real_range(ranges, batch)
    token = block * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    real = (token < kv_len) & (token >= start) & (token < end)
    held = real[:, None] & (dim < D)[None, :]
    key += batch * k_stride_b + head * k_stride_h + token.to(tl.int64)[:, None] * k_stride_l + dim[None, :]
    value += batch * v_stride_b + head * v_stride_h + token.to(tl.int64)[:, None] * v_stride_l + dim[None, :]
    for i in range(passes):
        line = row * passes + i
        anchor = tl.zeros([BLOCK_D], tl.float32)
        if TILTED:
            place = tl.minimum(tl.maximum(block + 1 - first_block, 0), q_blocks)
            anchor = tl.load(later + (line * (q_blocks + 1) + place) * D + dim, mask=dim < D, other=0.0)
        tile = tl.load(key, mask=held, other=0.0).to(tl.float32)
        score = tl.where(real, tl.sum(tile * anchor[None, :], 1) * scale, float("-inf"))
        highest = tl.max(score, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp(score - highest)
        total = tl.sum(weight, 0)
        weight = weight / tl.where(total > 0, total, 1.0)
        mean_key = tl.sum(tile * weight[:, None], 0).to(keys.dtype.element_ty)
        target = (line * kv_blocks + block) * D + dim
        tl.store(keys + target, mean_key, mask=dim < D)
        tangent = highest + tl.log(total) - scale * tl.sum(mean_key.to(tl.float32) * anchor, 0)
        tl.store(bias + line * kv_blocks + block, tangent * 1.4426950408889634)
        tile = tl.load(value, mask=held, other=0.0).to(tl.float32)
        mean_value = tl.sum(tile * weight[:, None], 0).to(values.dtype.element_ty)
        tl.store(values + target, mean_value, mask=dim < D)


def launch_options(head_dim: int) -> dict[str, int]:
    """Warps of a program."""
    return {"num_warps": 4 if head_dim <= 128 else 8}


def summaries(
    query: Tensor, key: Tensor, value: Tensor, ranges: Tensor, grid: Grid, scale: float, tilted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[B, H', nk, D]` in the inputs' dtype, bias fp32 `[B, H', nk]` to base 2.

    Args:
        query, key, value: unit stride in D. ranges: int32 `[B, 2]`. grid: theirs. scale: score scale.
        tilted: H' is the number of query heads; otherwise of key heads.
    """
    batch, kv_heads, kv_len, dim = key.shape
    heads = query.shape[1]
    shape = (batch, heads if tilted else kv_heads, grid.kv_blocks)
    keys, values = (torch.empty(*shape, dim, dtype=key.dtype, device=key.device) for _ in range(2))
    bias = torch.empty(shape, dtype=torch.float32, device=key.device)
    later = bias
    width = max(16, next_power_of_2(dim))
    with on_device(key):
        if tilted:
            means = block_mean(query, ranges, grid.offset, grid.block_size)
            later = means.new_empty(batch, heads, grid.q_blocks + 1, dim)
            _later_kernel[(batch * heads,)](
                means, ranges, later, heads, grid.offset, grid.q_blocks, D=dim, BLOCK_D=width, BLOCK=grid.block_size,
                ROWS=16,
            )  # fmt: skip
        _summary_kernel[(grid.kv_blocks, batch * kv_heads)](
            key, value, ranges, later, keys, values, bias, *key.stride()[:3], *value.stride()[:3], kv_heads,
            heads // kv_heads if tilted else 1, kv_len, grid.kv_blocks, grid.q_blocks, grid.offset // grid.block_size,
            scale, D=dim, BLOCK_D=width, BLOCK=grid.block_size, TILTED=tilted, **launch_options(dim),
        )  # fmt: skip
    return keys, values, bias
