"""Step 2: the Jensen-Shannon test that makes a head query-aware or vertical-slash.

pooled = softmax_J(s mean(last queries) . mean(k_J)) over all nb blocks      true[J] = sum of vertical over block J
D = sqrt(1/2 sum pooled ln(pooled / m) + 1/2 sum true ln(true / m)),  m = (pooled + true) / 2
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, denormal_exp, on_device, real_range


@triton.jit(do_not_specialize=[*LENGTHS, "tau", "gamma", "gamma_rest"])
def _pattern_kernel(
    logits,  # [rows, blocks] fp32
    columns,  # [rows, blocks] fp32
    ranges,
    distance,  # [rows] fp32, out
    aware,  # [rows] int32, out
    thresholds,  # [3, rows] fp32, out: mass that vertical, slash and Algorithm 4's scores have to reach
    heads,
    offset,
    blocks,
    dense_tokens,
    tau,
    gamma,  # in two parts, because numbers reach a kernel as fp32
    gamma_rest,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PUBLISHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, end = real_range(ranges, row // heads)
    block = tl.arange(0, WIDTH)
    inside = (block >= start // BLOCK) & (block * BLOCK < end)
    scores = tl.load(logits + row * blocks + block, mask=inside, other=float("-inf"))
    weights = denormal_exp(scores - tl.max(scores, 0))
    pooled = weights / tl.sum(weights, 0)
    true = tl.load(columns + row * blocks + block, mask=inside, other=0.0)
    middle = (pooled + true) / 2
    pooled_sum = tl.sum(tl.where(pooled > 0, pooled * tl.log(pooled / middle), 0.0), 0)
    true_sum = tl.sum(tl.where(true > 0, true * tl.log(true / middle), 0.0), 0)
    divergence = pooled_sum / 2 + true_sum / 2
    if PUBLISHED:  # as released: 0 log 0 and the root of a negative number are NaN, and NaN is below no tau
        zeros = tl.sum((inside & ((pooled == 0) | (true == 0))).to(tl.int32), 0)
        undefined = (zeros > 0) | (divergence < 0)
        result = tl.where(undefined, float("nan"), tl.sqrt(tl.maximum(divergence, 0.0)))
    else:
        result = tl.sqrt(tl.maximum(divergence, 0.0))
    dense = (end - start <= dense_tokens) | (end - tl.maximum(start, offset) <= 1)
    tl.store(distance + row, tl.where(dense, 0.0, result))
    tl.store(aware + row, ((result < tau) & (dense == 0)).to(tl.int32))
    row_blocks = (end - offset + BLOCK - 1) // BLOCK - tl.maximum(start - offset, 0) // BLOCK  # nq
    exact = tl.full([], 0.0, tl.float64) + gamma + gamma_rest
    rows = tl.num_programs(0)
    tl.store(thresholds + row, exact.to(tl.float32))
    tl.store(thresholds + rows + row, exact.to(tl.float32))
    tl.store(thresholds + 2 * rows + row, (exact * tl.maximum(row_blocks, 0)).to(tl.float32))


def head_pattern(
    logits: Tensor,
    columns: Tensor,
    ranges: Tensor,
    *,
    heads: int,
    offset: int,
    block_size: int,
    tau: float,
    gamma: float,
    dense_tokens: int,
    published: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The test on logits and columns, fp32 `[B * Hq, nk]`.

    Returns:
        JS distance fp32 `[B * Hq]`, query-aware flags int32 `[B * Hq]`, and the masses fp32 `[3, B * Hq]` that the
        coverage of vertical, slash and Algorithm 4's block scores has to reach.
    """
    rows, blocks = logits.shape
    distance = torch.empty(rows, dtype=torch.float32, device=logits.device)
    aware = torch.empty(rows, dtype=torch.int32, device=logits.device)
    thresholds = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    rounded = struct.unpack("f", struct.pack("f", gamma))[0]
    with on_device(logits):
        _pattern_kernel[(rows,)](
            logits, columns, ranges, distance, aware, thresholds, heads, offset, blocks, dense_tokens, tau, rounded,
            gamma - rounded, BLOCK=block_size, WIDTH=next_power_of_2(blocks), PUBLISHED=published, num_warps=8,
        )  # fmt: skip
    return distance, aware, thresholds
