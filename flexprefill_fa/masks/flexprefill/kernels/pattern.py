"""Step 2: the Jensen-Shannon test that makes a head query-aware or vertical-slash.

pooled = softmax_J(s mean(last queries) . mean(k_J)) over all nb blocks      true[J] = sum of vertical over block J
D = sqrt(1/2 sum pooled ln(pooled / m) + 1/2 sum true ln(true / m)),  m = (pooled + true) / 2
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.kernels.common import LENGTHS, denormal_exp, on_device, real_range

TILE = 32  # key blocks at a time


@triton.jit
def _pooled_scores(mean_query, mean_key, block, inside, dim, scale, D: tl.constexpr):
    """s q . K_J of a tile of blocks, -inf where not inside."""
    keys = tl.load(
        mean_key + block.to(tl.int64)[:, None] * D + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0
    )
    return tl.where(inside, tl.sum(keys * mean_query[None, :], 1) * scale, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _pattern_kernel(
    query,
    mean_key,  # [B, Hkv, blocks, D] fp32
    ranges,
    vertical,  # [B * Hq, kv_len] fp32
    column_sums,  # [B * Hq, blocks] fp32, out
    distance,  # [B * Hq] fp32, out
    aware,  # [B * Hq] int32, out
    q_stride_b,
    q_stride_h,
    q_stride_l,
    heads,
    groups,
    kv_len,
    offset,
    blocks,
    dense_tokens,
    scale,
    tau,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PUBLISHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    start, end = real_range(ranges, batch)
    lane = tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    q_position = end - BLOCK + lane
    q_real = q_position >= tl.maximum(start, offset)
    queries = tl.load(
        query + batch * q_stride_b + head * q_stride_h
        + (q_position - offset).to(tl.int64)[:, None] * q_stride_l + dim[None, :],
        mask=q_real[:, None] & (dim < D)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    rows = tl.sum(q_real.to(tl.int32), 0)
    mean_query = tl.sum(queries, 0) / tl.maximum(rows, 1)
    mean_key += (batch * (heads // groups) + head // groups) * blocks * D
    first, last = start // BLOCK, (end + BLOCK - 1) // BLOCK

    highest = float("-inf")
    for tile in range(first, last, TILE):
        block = tile + tl.arange(0, TILE)
        scores = _pooled_scores(mean_query, mean_key, block, block < last, dim, scale, D)
        highest = tl.maximum(highest, tl.max(scores, 0))
    total = tl.zeros([TILE], tl.float32)
    for tile in range(first, last, TILE):
        block = tile + tl.arange(0, TILE)
        total += denormal_exp(_pooled_scores(mean_query, mean_key, block, block < last, dim, scale, D) - highest)
    norm = tl.sum(total, 0)

    pooled_sum = tl.zeros([TILE], tl.float32)
    true_sum = tl.zeros([TILE], tl.float32)
    zeros = tl.zeros([TILE], tl.int32)
    for tile in range(first, last, TILE):
        block = tile + tl.arange(0, TILE)
        inside = block < last
        token = block[:, None] * BLOCK + lane[None, :]
        weights = tl.load(
            vertical + row * kv_len + token, mask=inside[:, None] & (token >= start) & (token < end), other=0.0
        )
        true = tl.sum(weights, 1)
        tl.store(column_sums + row * blocks + block, true, mask=inside)
        pooled = denormal_exp(_pooled_scores(mean_query, mean_key, block, inside, dim, scale, D) - highest) / norm
        middle = (pooled + true) / 2
        zeros += (inside & ((pooled == 0) | (true == 0))).to(tl.int32)
        pooled_sum += tl.where(pooled > 0, pooled * tl.log(pooled / middle), 0.0)
        true_sum += tl.where(true > 0, true * tl.log(true / middle), 0.0)
    divergence = tl.sum(pooled_sum, 0) / 2 + tl.sum(true_sum, 0) / 2
    if PUBLISHED:  # as released: 0 log 0 and the root of a negative number are NaN, and NaN is below no tau
        undefined = (tl.sum(zeros, 0) > 0) | (divergence < 0)
        result = tl.where(undefined, float("nan"), tl.sqrt(tl.maximum(divergence, 0.0)))
    else:
        result = tl.sqrt(tl.maximum(divergence, 0.0))
    dense = (end - start <= dense_tokens) | (rows <= 1)
    tl.store(distance + row, tl.where(dense, 0.0, result))
    tl.store(aware + row, ((result < tau) & (dense == 0)).to(tl.int32))


def head_pattern(
    query: Tensor,
    mean_key: Tensor,
    ranges: Tensor,
    vertical: Tensor,
    *,
    kv_len: int,
    block_size: int,
    scale: float,
    tau: float,
    dense_tokens: int,
    published: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """JS distance fp32 `[B * Hq]`, query-aware flags int32 `[B * Hq]`, and block sums of vertical `[B * Hq, nk]`."""
    batch, heads, q_len, dim = query.shape
    kv_heads, blocks = mean_key.shape[1], mean_key.shape[2]
    column_sums = torch.zeros(batch * heads, blocks, dtype=torch.float32, device=query.device)
    distance = torch.empty(batch * heads, dtype=torch.float32, device=query.device)
    aware = torch.empty(batch * heads, dtype=torch.int32, device=query.device)
    with on_device(query):
        _pattern_kernel[(batch * heads,)](
            query,
            mean_key,
            ranges,
            vertical,
            column_sums,
            distance,
            aware,
            *query.stride()[:3],
            heads,
            heads // kv_heads,
            kv_len,
            kv_len - q_len,
            blocks,
            dense_tokens,
            scale,
            tau,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK=block_size,
            TILE=TILE,
            PUBLISHED=published,
        )
    return distance, aware, column_sums
