"""Block means of queries or keys."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import cdiv, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range


@triton.jit(do_not_specialize=LENGTHS)
def _block_mean_kernel(
    values,  # [B, H, length, D]
    ranges,  # [B, 2]
    active,  # [B * H] int32, rows with 0 are skipped
    means,  # [B, H, blocks, D], out
    stride_b,
    stride_h,
    stride_l,
    heads,
    length,
    offset,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
):
    """mean[I] = sum of the real tokens of block I / their number; token i stands at position offset + i."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if not ALL:
        if tl.load(active + row) == 0:
            return
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    token = block * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    real = (token < length) & (token + offset >= start) & (token + offset < end)
    source = values + batch * stride_b + head * stride_h + token.to(tl.int64)[:, None] * stride_l + dim[None, :]
    tile = tl.load(source, mask=real[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)  # [BLOCK, BLOCK_D]
    count = tl.maximum(tl.sum(real.to(tl.float32), 0), 1.0)
    mean = (tl.sum(tile, 0) / count).to(means.dtype.element_ty)
    tl.store(means + (row * blocks + block) * D + dim, mean, mask=dim < D)


def block_mean(
    values: Tensor,
    ranges: Tensor,
    offset: int,
    block_size: int,
    active: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`[B, H, blocks, D]`: the mean over each block's real tokens (0 for a block without any), summed in fp32.

    Args:
        values: `[B, H, L, D]`, unit stride in D; token i stands at position offset + i.
        ranges: int32 `[B, 2]`, (start, end) of each element's real positions.
        active: int32 `[B * H]`, rows with 0 are left out (their means are undefined).
        dtype: of the means.
    """
    batch, heads, length, dim = values.shape
    blocks = cdiv(length, block_size)
    means = torch.empty(batch, heads, blocks, dim, dtype=dtype, device=values.device)
    with on_device(values):
        _block_mean_kernel[(blocks, batch * heads)](
            values,
            ranges,
            ranges if active is None else active,
            means,
            values.stride(0),
            values.stride(1),
            values.stride(2),
            heads,
            length,
            offset,
            blocks,
            D=dim,
            BLOCK_D=next_power_of_2(dim),
            BLOCK=block_size,
            ALL=active is None,
        )
    return means
