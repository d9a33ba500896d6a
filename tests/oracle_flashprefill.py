"""Brute-force oracle for FlashPrefill's block selection (DESIGN.md, section 5), in float64 numpy and plain loops.

It shares no code with the package. Positions and blocks are those of FlexAttention's absolute grid: query i stands at
position Lkv - Lq + i, key block J covers positions J B ... (J + 1) B - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class FlashOracle:
    """What `oracle_select` returns; numpy arrays over `[B, Hq, nq, nk]`.

    keep: bool. by_score: bool, cells that nothing but their score keeps or drops.
    margin: float64, how far, relatively to the scores' size, ln P is from the threshold of its row; inf for cells
        whose score decides nothing.
    """

    keep: np.ndarray
    by_score: np.ndarray
    margin: np.ndarray


def _row(
    queries: list[tuple[int, np.ndarray]], blocks: list[tuple[int, int, np.ndarray]], scale: float, alpha: float
) -> dict[int, tuple[bool, float]]:
    """Whether the score keeps each block of a row that some query counts for, and the margin of that.

    queries: (position, vector) of the real queries. blocks: (J, position of the last real key, mean key).
    """
    highest, sums = {}, {}
    for j, last_key, mean in blocks:
        scores = [scale * float(vector @ mean) for position, vector in queries if position >= last_key]
        if scores:
            highest[j] = max(scores)
            sums[j] = sum(math.exp(score - highest[j]) for score in scores)
    if not highest:
        return {}
    top = max(highest.values())
    log_p = {j: math.log(sums[j]) + highest[j] - top for j in highest}
    threshold = max(log_p.values()) + math.log(alpha)
    size = 1 + max(abs(m) for m in highest.values())
    return {j: (value >= threshold, abs(value - threshold) / size) for j, value in log_p.items()}


def oracle_select(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    alpha: float,
    sink_blocks: int,
    window_blocks: int,
    last_full_blocks: int,
    block_size: int,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> FlashOracle:
    """FlashPrefill's selection of section 5, by brute force in float64; mean keys are rounded to key's dtype.

    Args:
        query: `[B, Hq, Lq, D]`, the last Lq positions of the keys; any float dtype. key: `[B, Hkv, Lkv, D]`.
        alpha, sink_blocks, window_blocks, last_full_blocks, scale: section 5's knobs; the rest in blocks.
        block_size: tokens per block.
        starts: index of each element's first real key, default 0. lengths: number of its real keys.
    """
    n_batch, n_heads, lq, dim = query.shape
    n_kv_heads, lkv = key.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k = (x.detach().cpu().to(torch.float64).numpy() for x in (query, key))
    off, size = lkv - lq, block_size
    shape = (n_batch, n_heads, math.ceil(lq / size), math.ceil(lkv / size))
    keep, by_score, margin = np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, math.inf)
    for b in range(n_batch):
        start = 0 if starts is None else int(starts[b])
        end = lkv if lengths is None else start + int(lengths[b])
        real_blocks = [j for j in range(shape[3]) if max(j * size, start) < min((j + 1) * size, end)]
        rows = {}  # row block -> positions of its real queries
        for i in range(shape[2]):
            inside = range(off + i * size, min(off + (i + 1) * size, lkv))
            positions = [position for position in inside if start <= position < end]
            if positions:
                rows[i] = positions
        last_rows = sorted(rows)[len(rows) - min(last_full_blocks, len(rows)) :]
        for h in range(n_heads):
            head_keys = k[b, h // (n_heads // n_kv_heads)]
            blocks = []
            for j in real_blocks:
                positions = range(max(j * size, start), min((j + 1) * size, end))
                mean = torch.from_numpy(head_keys[positions[0] : positions[-1] + 1].mean(0)).to(key.dtype)
                blocks.append((j, positions[-1], mean.double().numpy()))
            for i, positions in rows.items():
                decided = _row([(p, q[b, h, p - off]) for p in positions], blocks, scale, alpha)
                diagonal = (off + i * size) // size
                for j in real_blocks:
                    if j * size > positions[-1]:
                        continue
                    always = j in real_blocks[:sink_blocks] or diagonal - j < window_blocks or i in last_rows
                    near, gap = decided.get(j, (False, math.inf))
                    keep[b, h, i, j] = always or near
                    by_score[b, h, i, j] = not always
                    if not always:
                        margin[b, h, i, j] = gap
    return FlashOracle(keep, by_score, margin)
