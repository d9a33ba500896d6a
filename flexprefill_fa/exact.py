"""Exact causal attention probabilities in fp32, a few rows at a time: what selections are measured against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.autocast import without_autocast
from flexprefill_fa.grid import Grid, real_ranges

SCORE_BYTES = 16 * 2**20
"""Scores held at a time: few enough for a processor's cache."""


def exact_probabilities(
    query: Tensor,
    key: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    score_bytes: int | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """The softmax of dense causal attention, some row blocks of one kv head at a time.

    Attention sinks, which take part of the probability in some models, are left out: every real row sums to 1.

    Args:
        query: `[B, Hq, q_len, D]`. key: `[B, Hkv, kv_len, D]`. Queries are the last `q_len` of the keys.
        block_size: tokens per block; rows come in multiples of it.
        scale: score scale, default 1/sqrt(D).
        softcap: the scaled scores are capped to it: softcap x tanh(score / softcap).
        starts, lengths: padding, int `[B]`, as for `BlockSelection`.
        score_bytes: how much to hold at a time, at least one row block of one kv head; default `SCORE_BYTES`.

    Yields:
        The kv head, the first row, and float32 `[B, Hq / Hkv, rows, keys]`: the probabilities of these rows on the keys
        of every block that they can see, zeros in rows without a real query. `keys` is a multiple of the block size.
    """
    batch, heads, _, dim = query.shape
    grid = Grid(query.shape[2], key.shape[2], block_size)
    groups = heads // key.shape[1]
    factor = dim**-0.5 if scale is None else scale
    budget = SCORE_BYTES if score_bytes is None else score_bytes
    padded = starts is not None or lengths is not None
    ranges = real_ranges(starts, lengths, batch, grid.kv_len, query.device)
    start, end = ranges[:, :1], ranges[:, 1:]
    positions = torch.arange(grid.kv_blocks * block_size, device=query.device)
    real_key = (positions >= start) & (positions < end)  # [B, nk * block]
    queries = (query.float() * factor).unflatten(1, (-1, groups))  # [B, Hkv, G, Lq, D]
    keys = F.pad(key.float(), (0, 0, 0, len(positions) - grid.kv_len))
    step = max(1, budget // (4 * batch * groups * grid.kv_len * block_size)) * block_size
    for first in range(0, grid.q_len, step):
        last = min(first + step, grid.q_len)
        position = grid.offset + torch.arange(first, last, device=query.device)
        seen = -(-(grid.offset + last) // block_size) * block_size  # keys of the blocks that these rows can see
        visible = (positions[:seen] <= position[:, None]) & real_key[:, None, :seen]
        real_row = (position >= start) & (position < end)  # [B, rows]
        masked = 0 if padded else (grid.offset + first) // block_size * block_size  # all see the columns before it
        for head in range(key.shape[1]):  # one kv group at a time: the scores stay small
            with without_autocast(query.device.type):
                scores = queries[:, head, :, first:last].flatten(1, 2) @ keys[:, head, :seen].mT
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.unflatten(1, (groups, -1))  # [B, G, rows, keys]
            scores[..., masked:].masked_fill_(~visible[:, None, :, masked:], float("-inf"))
            probability = scores.softmax(-1)
            if padded:  # a row that sees no key: 0 / 0
                probability.nan_to_num_(0.0).mul_(real_row[:, None, :, None])
            yield head, first, probability


def block_mass(
    query: Tensor,
    key: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The probability that the rows of each query block give to the keys of each key block, summed over the rows.

    Args:
        query, key, block_size, scale, softcap, starts, lengths: as for `exact_probabilities`.

    Returns:
        float32 `[B, Hq, nq, nk]`; a row of blocks sums to its number of real queries.
    """
    batch, heads = query.shape[:2]
    grid = Grid(query.shape[2], key.shape[2], block_size)
    mass = torch.zeros(batch, heads, grid.q_blocks, grid.kv_blocks, device=query.device)
    by_group = mass.unflatten(1, (key.shape[1], -1))
    pieces = exact_probabilities(query, key, block_size, scale=scale, softcap=softcap, starts=starts, lengths=lengths)
    for head, first, probability in pieces:
        by_block = sum_row_blocks(probability.unflatten(-1, (-1, block_size)).sum(-1), block_size)
        row = first // block_size
        by_group[:, head, :, row : row + by_block.shape[2], : by_block.shape[3]] = by_block
    return mass


def sum_row_blocks(values: Tensor, block_size: int) -> Tensor:
    """`[..., rows, n]` summed over blocks of rows to `[..., blocks, n]`; the last block may be short."""
    short = -values.shape[-2] % block_size
    return F.pad(values, (0, 0, 0, short)).unflatten(-2, (-1, block_size)).sum(-2)
