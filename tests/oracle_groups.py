"""What the oracles of XAttention and CoSA share (DESIGN.md, section 6): groups of S positions, their scores X, and the
prefix of ranked blocks. float64 numpy and plain loops, no code of the package.

Decisions where section 6 says nothing, one line each:

- Key group c holds the positions cS ... cS + S - 1 of FlexAttention's absolute grid.
- Query group r holds the queries rS ... rS + S - 1, at positions Lkv - Lq + rS ...: no group lies in two query blocks.
- Padded queries and keys are zero vectors: X of a partial group sums over its real members, and is divided by S too.
- A query group without a real query has no say; a key group without a real key is not seen.
- Group r sees group c when c's first position is not after r's last.
- Ties go to the lower block; the block that crosses the share is kept; if rounding never reaches it, all are kept.
- A share of 1 or more keeps every causal block.
- Always kept: the first block with a real key, and the blocks of the query block's first and last position. They are
  ranked like any other block, so they use up the share only at their own rank.
- A query block without a real query keeps nothing; a block without a real key is never kept.
- No length is dense by rule, nor is a single query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

INF = math.inf


@dataclass(frozen=True)
class GroupOracle:
    """What `oracle_select` returns; numpy arrays over `[H, nq, nk]`.

    keep: bool. by_score: bool, causal cells that nothing but the scores keeps or drops.
    margin: float64, the smallest relative error of the blocks' weights (and of P / 0.999, in CoSA) that can flip the
        cell, divided by 1 + the row block's largest |X|, because fp32 scores are off in proportion to their size. A
        bound from below: 0 where a tie decides, inf for cells that the scores do not decide.
    """

    keep: np.ndarray
    by_score: np.ndarray
    margin: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """How a row block ranks key blocks: those in `first`, then the others, either by descending weight.

    weights: float64 `[nk]`. first: bool `[nk]`. first_gap: float64 `[nk]`, relative error that flips `first`.
    """

    weights: np.ndarray
    first: np.ndarray
    first_gap: np.ndarray

    def order(self, blocks: list[int]) -> list[int]:
        """The blocks, best first."""
        return sorted(blocks, key=lambda j: (not self.first[j], -self.weights[j], j))


# --- Groups -----------------------------------------------------------------------------------------------------------


def _groups(x: np.ndarray, position: int, start: int, end: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(`[G, S, D]` vectors, padded ones zero, bool `[G]` groups with a real member) of x `[L, D]`.

    position: of x[0]. start, end: positions [start, end) are real.
    """
    count = math.ceil(len(x) / stride)
    vectors, real = np.zeros((count * stride, x.shape[1])), np.zeros(count * stride, bool)
    for index in range(len(x)):
        if start <= position + index < end:
            vectors[index], real[index] = x[index], True
    return vectors.reshape(count, stride, -1), np.asarray(real.reshape(count, stride).any(1))


def group_scores(
    query: np.ndarray, key: np.ndarray, *, start: int, end: int, stride: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(X float64 `[R, C]`, -inf where group r does not see group c; bool `[R]` groups with a real query) of one head.

    query `[Lq, D]`, the last positions of key `[Lkv, D]`; positions [start, end) are real.
    """
    off = len(key) - len(query)
    q, real_q = _groups(query, off, start, end, stride)
    k, real_k = _groups(key, 0, start, end, stride)
    x = np.zeros((len(q), len(k)))
    for i in range(stride):
        x += q[:, stride - 1 - i] @ k[:, i].T
    x *= scale / stride
    for r in range(len(q)):
        last = off + r * stride + stride - 1
        for c in range(len(k)):
            if c * stride > last or not real_k[c]:
                x[r, c] = -INF
    return x, real_q


# --- The prefix -------------------------------------------------------------------------------------------------------


def shortest_prefix(order: list[int], weights: np.ndarray, share: float) -> list[int]:
    """The first blocks of the order that reach the share of the weight of all."""
    target = share * sum(weights[j] for j in order)
    kept, reached = [], 0.0
    for j in order:
        kept.append(j)
        reached += weights[j]
        if reached >= target:
            break
    return kept


def _overtaking(ranking: Ranking, better: int, worse: int) -> float:
    """The smallest relative error with which `worse` can come before `better`."""
    weights, gap = ranking.weights, ranking.first_gap
    both = weights[better] + weights[worse]
    by_weight = max(0.0, (weights[better] - weights[worse]) / both) if both > 0 else 0.0
    if ranking.first[better] and ranking.first[worse]:
        return min(by_weight, gap[better])
    if not ranking.first[better]:
        return min(by_weight, gap[worse])
    one, two = sorted((gap[better], gap[worse]))
    return min(max(one, by_weight), two)  # alike in one flip, and then by weight; the other way round in two


def flip_margins(ranking: Ranking, order: list[int], kept: int, share: float) -> list[float]:
    """Per rank, the smallest relative error that can flip it; the first `kept` ranks are kept.

    A block is kept when the weight before it is below the target, so it flips by the weight before it alone, or with
    blocks that overtake it (it is kept) or that it overtakes (it is dropped), the cheapest first.
    """
    weights = ranking.weights[order]
    target = share * weights.sum()
    margins = []
    for rank in range(len(order)):
        before = weights[:rank].sum()
        if rank < kept:
            movers = range(rank + 1, len(order))
            cost = np.array([_overtaking(ranking, order[rank], order[m]) for m in movers])
        else:
            movers = range(rank)
            cost = np.array([_overtaking(ranking, order[m], order[rank]) for m in movers])
        cheapest = np.argsort(cost, kind="stable")
        moved = np.concatenate([[0.0], weights[list(movers)][cheapest].cumsum()])
        missing = target - before - moved if rank < kept else before - moved - target
        errors = np.maximum(np.concatenate([[0.0], cost[cheapest]]), missing / target)
        margins.append(max(0.0, float(errors.min())))
    return margins


# --- The selection ----------------------------------------------------------------------------------------------------


def select_by_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    rank: Callable[[np.ndarray, int], Ranking],
    *,
    share: float,
    stride: int,
    block_size: int,
    scale: float | None,
    start: int,
    end: int | None,
) -> GroupOracle:
    """The prefix that reaches the share, per query block, in the order that `rank` gives.

    query `[H, Lq, D]`, the last Lq positions of key `[Hkv, Lkv, D]`; any float dtype. rank: from X `[G, C]` of the
    groups of one query block that hold a real query, -inf where unseen, and the groups per key block.
    """
    (n_heads, lq, dim), (n_kv_heads, lkv) = query.shape, key.shape[:2]
    if block_size % stride:
        raise ValueError(f"stride must divide block_size {block_size}, got {stride}")
    scale = 1 / math.sqrt(dim) if scale is None else scale
    end = lkv if end is None else end
    q, k = (x.detach().cpu().to(torch.float64).numpy() for x in (query, key))
    off, size = lkv - lq, block_size
    shape = (n_heads, math.ceil(lq / size), math.ceil(lkv / size))
    keep, by_score, margin = np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, INF)
    real_blocks = [j for j in range(shape[2]) if max(j * size, start) < min((j + 1) * size, end)]
    per_block = size // stride
    for h in range(n_heads):
        x, real_q = group_scores(
            q[h], k[h // (n_heads // n_kv_heads)], start=start, end=end, stride=stride, scale=scale
        )
        for i in range(shape[1]):
            positions = range(off + i * size, min(off + (i + 1) * size, lkv))
            real = [position for position in positions if start <= position < end]
            if not real:
                continue
            visible = [j for j in real_blocks if j * size <= real[-1]]
            always = {real_blocks[0], positions[0] // size, real[-1] // size}
            groups = slice(i * per_block, (i + 1) * per_block)
            scores = x[groups][real_q[groups]]
            ranking = rank(scores, per_block)
            order = ranking.order(visible)
            kept = order if share >= 1 else shortest_prefix(order, ranking.weights, share)
            flips = [INF] * len(order) if share >= 1 else flip_margins(ranking, order, len(kept), share)
            largest = 1 + np.abs(scores[scores > -INF]).max()
            for j, flip in zip(order, flips, strict=True):
                keep[h, i, j] = j in kept or j in always
                by_score[h, i, j] = j not in always
                if j not in always:
                    margin[h, i, j] = flip / largest
    return GroupOracle(keep, by_score, margin)
