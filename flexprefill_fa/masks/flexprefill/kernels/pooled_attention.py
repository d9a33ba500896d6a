"""Algorithm 4's block scores: softmax over causal blocks J of s mean(q_I) . mean(k_J), for query-aware heads only."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import cdiv, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, on_device, real_range


def tile_options(head_dim: int, q_blocks: int) -> dict[str, int]:
    """Row blocks and key blocks of a tile: large ones where there is work for them, within 163 KB of shared memory."""
    large = q_blocks >= 256 and head_dim <= 128
    return {"ROWS": 64 if large else 16, "COLUMNS": 64 if head_dim <= 128 else 32, "num_warps": 8 if large else 4}


@triton.jit
def _tile(mean_query, mean_key, row_block, block, row_inside, visible, scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    queries = tl.load(
        mean_query + row_block[:, None] * D + dim[None, :], mask=row_inside[:, None] & (dim < D)[None, :], other=0.0
    )
    keys = tl.load(
        mean_key + block[:, None] * D + dim[None, :],
        mask=(tl.max(visible.to(tl.int32), 0) > 0)[:, None] & (dim < D)[None, :],
        other=0.0,
    )
    scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * scale
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _pooled_attention_kernel(
    mean_query,  # [B, Hq, q_blocks, D] fp32
    mean_key,  # [B, Hkv, kv_blocks, D] fp32
    ranges,
    aware,  # [B * Hq] int32
    scores,  # [B * Hq, q_blocks, kv_blocks] fp32, out
    heads,
    groups,
    offset,
    kv_len,
    q_blocks,
    kv_blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    if tl.load(aware + row) != 0:
        batch, head = row // heads, row % heads
        start, end = real_range(ranges, batch)
        mean_query += row * q_blocks * D
        mean_key += (batch * (heads // groups) + head // groups) * kv_blocks * D
        scores += row * q_blocks * kv_blocks
        row_block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row_first = offset + row_block * BLOCK
        row_last = tl.minimum(tl.minimum(row_first + BLOCK, kv_len), end) - 1
        row_inside = (row_block < q_blocks) & (row_last >= tl.maximum(row_first, start))
        lane = tl.arange(0, COLUMNS)
        width = tl.minimum(
            kv_blocks, offset // BLOCK + tl.program_id(0) * ROWS + ROWS + 1
        )  # columns that may be causal

        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, width, COLUMNS):
            block = first + lane
            visible = row_inside[:, None] & (block >= start // BLOCK) & (block[None, :] * BLOCK <= row_last[:, None])
            tile = _tile(mean_query, mean_key, row_block, block, row_inside, visible, scale, D, BLOCK_D)
            higher = tl.maximum(highest, tl.max(tile, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(tile - base[:, None]), 1)
            highest = higher
        base = tl.where(row_inside, highest, 0.0)
        norm = tl.where(row_inside, total, 1.0)
        for first in range(0, width, COLUMNS):
            block = first + lane
            visible = row_inside[:, None] & (block >= start // BLOCK) & (block[None, :] * BLOCK <= row_last[:, None])
            tile = _tile(mean_query, mean_key, row_block, block, row_inside, visible, scale, D, BLOCK_D)
            tl.store(
                scores + row_block.to(tl.int64)[:, None] * kv_blocks + block[None, :],
                tl.exp(tile - base[:, None]) / norm[:, None],
                mask=(row_block < q_blocks)[:, None] & (block < kv_blocks)[None, :],
            )


def pooled_attention(
    mean_query: Tensor,
    mean_key: Tensor,
    ranges: Tensor,
    aware: Tensor,
    *,
    offset: int,
    kv_len: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """fp32 `[B * Hq, nq, nk]`, 0 where not causal.

    Undefined for heads that are not query-aware, and in row block I from column offset // B + I + 2 on.
    """
    batch, heads, q_blocks, dim = mean_query.shape
    kv_heads, kv_blocks = mean_key.shape[1], mean_key.shape[2]
    scores = torch.empty(batch * heads, q_blocks, kv_blocks, dtype=torch.float32, device=mean_query.device)
    with on_device(mean_query):
        options = tile_options(dim, q_blocks)
        _pooled_attention_kernel[(cdiv(q_blocks, options["ROWS"]), batch * heads)](
            mean_query,
            mean_key,
            ranges,
            aware,
            scores,
            heads,
            heads // kv_heads,
            offset,
            kv_len,
            q_blocks,
            kv_blocks,
            scale,
            D=dim,
            BLOCK_D=max(16, next_power_of_2(dim)),
            BLOCK=block_size,
            num_stages=2,
            **options,
        )
    return scores
