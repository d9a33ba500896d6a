"""Brute-force oracle for XAttention's block selection (DESIGN.md, section 6), in float64; decisions in oracle_groups.

X[r, c] = sum_{i<S} q[rS + S - 1 - i] . k[cS + i] s / S; softmax over the groups c that r sees; A[I, J] sums it over the
groups of blocks I and J; per I the fewest blocks, by descending A, that reach the threshold x sum_J A[I, J].
"""

from __future__ import annotations

import numpy as np
import torch
from oracle_groups import INF, GroupOracle, Ranking, select_by_groups


def _rank(scores: np.ndarray, per_block: int) -> Ranking:
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    firsts = range(0, scores.shape[1], per_block)
    weights = np.array([shares[:, c : c + per_block].sum() for c in firsts])  # A
    return Ranking(weights, np.zeros(len(weights), bool), np.full(len(weights), INF))


def oracle_select(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    threshold: float,
    stride: int,
    block_size: int,
    scale: float | None = None,
    start: int = 0,
    end: int | None = None,
) -> GroupOracle:
    """XAttention's selection of section 6 for one batch element, by brute force in float64.

    Args:
        query: `[H, Lq, D]`, the last Lq positions of the keys; any float dtype. key: `[Hkv, Lkv, D]`.
        threshold: share of a row block's probability; 1 or more keeps all.
        stride, block_size: S and B in tokens; S divides B. scale: default 1/sqrt(D).
        start, end: positions [start, end) are real, default all.
    """
    return select_by_groups(
        query, key, _rank, share=threshold, stride=stride, block_size=block_size, scale=scale, start=start, end=end
    )
