"""Step 3 as printed: per block diagonal, the slash mass of its offsets and whether a kept offset passes through it.

The offsets through cell (I, J) depend on w = (position of row block I's first query) - J B alone: they are
[w - B + 1, w + B - 1], or up to w + e for the last row block, whose last real query is its e-th. Item u of the outputs
stands for w = (offset mod B) + (u - 1) B, that is for u = I - J + offset // B + 1.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.kernels.common import LENGTHS, bits_of, on_device, real_range
from flexprefill_fa.kernels.coverage import Prefix, in_prefix


@triton.jit(do_not_specialize=LENGTHS)
def _diagonal_windows_kernel(
    slash,  # [rows, kv_len] fp32, by offset
    values,  # [rows] int32, the offsets' prefix
    cuts,  # [rows] int32
    ranges,
    mass,  # [2, rows, width] fp32, out: whole row blocks, last row block
    hit,  # [2, rows, width] int8, out
    heads,
    kv_len,
    offset,
    width,
    BLOCK: tl.constexpr,
):
    item, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    n = end - start // BLOCK * BLOCK
    last_query = (end - 1 - offset) % BLOCK
    first = offset % BLOCK + (item - 1) * BLOCK  # w
    window = first - BLOCK + 1 + tl.arange(0, 2 * BLOCK)
    valid = (window >= 0) & (window < n)
    mass_here = tl.load(slash + row * kv_len + window, mask=valid, other=0.0)
    kept = in_prefix(bits_of(mass_here), window, tl.load(values + row), tl.load(cuts + row)) & valid
    kept = kept.to(tl.int32)
    for kind in tl.static_range(2):
        upper = first + (BLOCK - 1 if kind == 0 else last_query)
        target = (kind * tl.num_programs(1) + row) * width + item
        tl.store(mass + target, tl.sum(tl.where(window <= upper, mass_here, 0.0), 0))
        tl.store(hit + target, tl.max(tl.where(window <= upper, kept, 0), 0).to(tl.int8))


@triton.jit(do_not_specialize=LENGTHS)
def _column_hits_kernel(vertical, values, cuts, ranges, hit, heads, kv_len, blocks, BLOCK: tl.constexpr):
    """hit[J] = 1 if a kept token lies in block J."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = (token >= start) & (token < end)
    bits = bits_of(tl.load(vertical + row * kv_len + token, mask=real, other=0.0))
    kept = in_prefix(bits, token, tl.load(values + row), tl.load(cuts + row)) & real
    tl.store(hit + row * blocks + block, tl.max(kept.to(tl.int32), 0).to(tl.int8))


def diagonal_windows(
    slash: Tensor, prefix: Prefix, ranges: Tensor, *, heads: int, offset: int, blocks: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Slash mass (fp32) and hits (int8) per diagonal, `[2, B * Hq, nk + 2]`: whole row blocks, last row block."""
    rows, kv_len = slash.shape
    width = blocks + 2
    mass = torch.empty(2, rows, width, dtype=torch.float32, device=slash.device)
    hit = torch.empty(2, rows, width, dtype=torch.int8, device=slash.device)
    with on_device(slash):
        _diagonal_windows_kernel[(width, rows)](
            slash, prefix.value, prefix.cut, ranges, mass, hit, heads, kv_len, offset, width, BLOCK=block_size
        )
    return mass, hit


def column_hits(
    vertical: Tensor, prefix: Prefix, ranges: Tensor, *, heads: int, blocks: int, block_size: int
) -> Tensor:
    """int8 `[B * Hq, nk]`: blocks that hold a kept token."""
    rows, kv_len = vertical.shape
    hit = torch.empty(rows, blocks, dtype=torch.int8, device=vertical.device)
    with on_device(vertical):
        _column_hits_kernel[(blocks, rows)](
            vertical, prefix.value, prefix.cut, ranges, hit, heads, kv_len, blocks, BLOCK=block_size
        )
    return hit
