"""Brute-force oracle for CoSA's block selection (DESIGN.md, section 6), in float64; decisions in oracle_groups.

X as in XAttention. P[r, J] = exp(max_{c in J} X[r, c] - max_c X[r, c]) over the groups c that r sees. Per row block I,
key blocks with P >= 0.999 for some r in I come first, by descending sum_r P[r, J], and then the others, by the same;
the shortest prefix whose sums reach the share of all sums is kept. It may end before the last of the first ones.
"""

from __future__ import annotations

import numpy as np
import torch
from oracle_groups import GroupOracle, Ranking, select_by_groups

MAXIMUM = 0.999


def _rank(scores: np.ndarray, per_block: int) -> Ranking:
    firsts = range(0, scores.shape[1], per_block)
    highest = np.array([scores[:, c : c + per_block].max(1) for c in firsts]).T  # [G, nk], -inf where none is seen
    log_p = highest - scores.max(1, keepdims=True)
    p = np.exp(log_p)
    return Ranking(p.sum(0), (p >= MAXIMUM).any(0), np.abs(log_p.max(0) - np.log(MAXIMUM)))


def oracle_select(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    share: float,
    block_size: int,
    stride: int = 8,
    scale: float | None = None,
    start: int = 0,
    end: int | None = None,
) -> GroupOracle:
    """CoSA's selection of section 6 for one batch element, by brute force in float64.

    Args:
        query: `[H, Lq, D]`, the last Lq positions of the keys; any float dtype. key: `[Hkv, Lkv, D]`.
        share: of the sums of P over a row block, p; 1 or more keeps all.
        block_size, stride: B and S in tokens; S divides B. scale: default 1/sqrt(D).
        start, end: positions [start, end) are real, default all.
    """
    return select_by_groups(
        query, key, _rank, share=share, stride=stride, block_size=block_size, scale=scale, start=start, end=end
    )
