"""A key block as one key, one value and a weight, by which a query that does not read it can still count it.

For query q and the real keys k of block J, with a fixed vector a, the anchor,

    sum_k exp(s q . k)     ~  exp(bias + s q . K)       K = sum_k p_k k,  p = softmax_k(s a . k)
    sum_k exp(s q . k) v   ~  exp(bias + s q . K) V     V = sum_k p_k v,  bias = log sum_k exp(s a . k) - s a . K

The first is the tangent of a convex function of q (its logarithm) at a: right there, and nowhere too much.

- Mean (arXiv 2608.19758): a = 0, so K and V are the block's means and bias is the logarithm of its number of keys. One
  for each key head.
- Tilted: a is the mean of the queries that could drop J, all those of query blocks that lie wholly behind it; p is the
  block's uniform distribution, exponentially tilted to where these queries look. One for each query head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.grid import Grid


def real_positions(ranges: Tensor, grid: Grid) -> Tensor:
    """int64 `[B, nk, block]`: the position of every key, -1 for padding; from the real ranges int `[B, 2]`."""
    start, end = ranges.long()[..., None].unbind(1)
    position = torch.arange(grid.kv_blocks * grid.block_size, device=ranges.device)
    real = (position >= start) & (position < end)
    return torch.where(real, position, -1).unflatten(1, (grid.kv_blocks, grid.block_size))


def summaries(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float, tilted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every block's K, V and bias, and its last real position.

    Args:
        query: `[B, Hq, Lq, D]`. key, value: `[B, Hkv, Lkv, D]`.
        positions: of the keys, int64 `[B, nk, block]`, see `real_positions`.
        scale: score scale, s.
        tilted: around the mean of later queries; otherwise around 0.

    Returns:
        K and V `[B, Hq, nk, D]` (not tilted: `[B, Hkv, nk, D]`) in the inputs' dtype; bias fp32 `[B, Hq, nk]` (not
        tilted: `[B, Hkv, nk]`), minus infinity for a block without a real key; int64 `[B, nk]`, the last real position,
        of a block without one beyond all others.
    """
    grid = Grid(query.shape[2], key.shape[2], positions.shape[2])
    real, last = positions >= 0, positions.amax(-1)
    last = last.masked_fill(last < 0, torch.iinfo(torch.int64).max)

    times = query.shape[1] // key.shape[1] if tilted else 1
    keys, values = (
        F.pad(x.float(), (0, 0, 0, real[0].numel() - grid.kv_len))
        .unflatten(2, real.shape[1:])
        .repeat_interleave(times, 1)
        for x in (key, value)
    )  # [B, H, nk, block, D]
    anchor = _later_means(query, real, grid) if tilted else torch.zeros_like(keys[:, :, :, 0])
    scores = (keys @ anchor[..., None])[..., 0] * scale
    scores = scores.masked_fill(~real[:, None], -torch.inf)  # [B, H, nk, block]
    shares = scores.softmax(-1).nan_to_num(0.0)[..., None, :]
    mean_keys, mean_values = (((shares @ x)[..., 0, :]).to(key.dtype) for x in (keys, values))
    return mean_keys, mean_values, scores.logsumexp(-1) - scale * (mean_keys.float() * anchor).sum(-1), last


def _later_means(query: Tensor, real_keys: Tensor, grid: Grid) -> Tensor:
    """fp32 `[B, Hq, nk, D]`: for each key block the mean of the real queries of all query blocks wholly behind it."""
    real = real_keys.flatten(1)[:, None, grid.offset : grid.kv_len, None]  # queries are the last positions
    fill = (0, 0, 0, grid.q_blocks * grid.block_size - grid.q_len)
    shape = (grid.q_blocks, grid.block_size)
    sums = F.pad(query.float().where(real, 0.0), fill).unflatten(2, shape).sum(3)  # [B, Hq, nq, D]
    counts = F.pad(real, fill).unflatten(2, shape).sum(3)  # [B, 1, nq, 1]
    total, number = (F.pad(x.flip(2).cumsum(2).flip(2), (0, 0, 0, 1)) for x in (sums, counts))
    block = torch.arange(grid.kv_blocks, device=query.device)
    first = (block + 1 - grid.offset // grid.block_size).clamp(0, grid.q_blocks)
    return total[:, :, first] / number[:, :, first].clamp(min=1)
