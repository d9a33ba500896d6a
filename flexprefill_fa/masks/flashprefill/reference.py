"""FlashPrefill's selection in plain PyTorch: the specification that the Triton kernels are tested against.

    m[I, J] = max_q s q . k_J      S[I, J] = sum_q exp(s q . k_J - m[I, J])      P[I, J] = S exp(m[I, J] - max_J m)

over the real queries q of row block I that see the last real key of block J; k_J is the mean of J's real keys. A row
keeps J when P[I, J] >= alpha max_J P[I, J], and some blocks in any case (arXiv 2603.06199, section 3).

One batch element at a time, on FlexAttention's absolute grid. Shapes in comments: H query heads, nq row blocks, nk key
blocks, B block size. Scores, means and sums are fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.grid import Grid, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.masks.flashprefill.config import FlashPrefillConfig
from flexprefill_fa.selection import index_lists

ROW_BLOCKS = 16  # whose scores are in memory at a time


def mean_keys(key: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Mean over the real keys of each block: [Hkv, Lkv, D] -> fp32 [Hkv, nk, D], 0 for a block without any."""
    position = torch.arange(key.shape[1], device=key.device)
    real = (position >= start) & (position < end)
    fill = -key.shape[1] % block_size
    values = torch.where(real[:, None], key.float(), 0.0)  # what stands in padding may be anything
    total = F.pad(values, (0, 0, 0, fill)).unflatten(1, (-1, block_size)).sum(2)
    count = F.pad(real, (0, fill)).unflatten(0, (-1, block_size)).sum(-1)
    return total / count.clamp(min=1)[:, None]


def block_scores(query: Tensor, key: Tensor, start: int, end: int, grid: Grid, scale: float) -> Tensor:
    """P, fp32 [H, nq, nk]; 0 where no row counts. query [H, Lq, D], key [Hkv, Lkv, D].

    A few row blocks at a time: the scores of all queries would be B times the result.
    """
    size = grid.block_size
    pooled = mean_keys(key, start, end, size).repeat_interleave(query.shape[0] // key.shape[0], 0)  # [H, nk, D]
    rows = ROW_BLOCKS * size
    parts = [
        _row_scores(query[:, first : first + rows], pooled, first, start, end, grid, scale)
        for first in range(0, grid.q_len, rows)
    ]
    return torch.cat(parts, 1)


def _row_scores(query: Tensor, pooled: Tensor, first: int, start: int, end: int, grid: Grid, scale: float) -> Tensor:
    """P of the row blocks of some queries, query `first` and those behind it; pooled [H, nk, D]."""
    size = grid.block_size
    position = grid.offset + first + torch.arange(query.shape[1], device=query.device)
    real = (position >= start) & (position < end)  # [L], L the queries given
    block_first = torch.arange(grid.kv_blocks, device=query.device) * size
    last_key = (block_first + size).clamp(max=end) - 1  # [nk], position of each block's last real key
    holds_key = (block_first + size > start) & (block_first < end)
    counts = real[:, None] & holds_key & (position[:, None] >= last_key)  # [L, nk]

    scores = torch.where(real[:, None], query.float(), 0.0) @ pooled.mT * scale  # [H, L, nk]
    scores = scores.masked_fill(~counts, float("-inf"))
    scores = F.pad(scores, (0, 0, 0, -query.shape[1] % size), value=float("-inf")).unflatten(1, (-1, size))
    highest = scores.amax(2)  # m, [H, nq, nk]
    base = highest.masked_fill(highest == float("-inf"), 0.0)
    total = (scores - base[:, :, None]).exp().sum(2)  # S; exp(-inf) = 0 where no row counts
    best = highest.amax(-1, keepdim=True)
    return total * (highest - best.masked_fill(best == float("-inf"), 0.0)).exp()


def always_kept(start: int, end: int, grid: Grid, config: FlashPrefillConfig, device: torch.device) -> Tensor:
    """bool [nq, nk], before the causal rule: sink blocks, window blocks, last rows."""
    size = grid.block_size
    block = torch.arange(grid.kv_blocks, device=device)
    row = torch.arange(grid.q_blocks, device=device)[:, None]
    sink = block < start // size + config.sink_blocks
    diagonal = torch.div(grid.offset + row * size, size, rounding_mode="floor")  # J0, of each row's first position
    last_row = (end - 1 - grid.offset) // size  # the last one with a real query
    return sink | (diagonal - block < config.window_blocks) | (row > last_row - config.last_full_blocks)


def select(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: FlashPrefillConfig,
    scale: float | None = None,
    all_partial: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four index tensors and zeros for the JS distances, see `BlockSelection`.

    all_partial leaves the full list empty.
    """
    batch, heads, q_len, dim = query.shape
    grid = Grid(q_len, key.shape[2], config.block_size)
    ranges = real_ranges(starts, lengths, batch, grid.kv_len, key.device)
    keep = torch.zeros(batch, heads, grid.q_blocks, grid.kv_blocks, dtype=torch.bool, device=query.device)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    for b, (start, end) in enumerate(ranges.tolist()):
        scores = block_scores(query[b], key[b], start, end, grid, scale)
        threshold = scores.amax(-1, keepdim=True) * config.alpha
        near_best = (scores > 0) & (scores >= threshold)
        keep[b] = near_best | always_kept(start, end, grid, config, query.device)
    keep &= visible_blocks(grid, ranges)[:, None]
    full = keep & unmasked_blocks(grid, ranges)[:, None] & (not all_partial)
    distance = torch.zeros(batch, heads, device=query.device)
    return *index_lists(keep & ~full), *index_lists(full), distance
