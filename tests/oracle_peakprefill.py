"""Brute-force oracle for PeakPrefill's block selection (DESIGN.md, section 5b), in float64 numpy and plain loops.

It shares no code with the package. Positions and blocks are those of FlexAttention's absolute grid: query i stands at
position Lkv - Lq + i, key block J covers positions J B ... (J + 1) B - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

INF = math.inf
CLUSTER_TIE = 2e-6  # of the largest squared norm: distances that differ by less may be ordered either way in fp32
ROUNDS = 3  # in which centres move
CLUSTER_SHIFT = 2.0  # of z, by such a change


@dataclass(frozen=True)
class PeakOracle:
    """What `oracle_select` returns; numpy arrays over `[B, Hq, nq, nk]`.

    keep: bool. by_score: bool, cells that nothing but X keeps or drops.
    peaks: float64, X; 0 where no real row sees the block.
    margin: float64, how far ln X is from ln peak, relatively to the scores' size; 0 where a near tie among distances of
        keys may decide; inf for cells whose X decides nothing.
    """

    keep: np.ndarray
    by_score: np.ndarray
    peaks: np.ndarray
    margin: np.ndarray


@dataclass(frozen=True)
class Representatives:
    """Those of one key block: float64 `[R, D]` means and variances, `[R]` weights (0: stands for nothing).

    gap: the closest decision between two distances, over the largest squared norm of a key.
    """

    means: np.ndarray
    variances: np.ndarray
    weights: np.ndarray
    gap: float


def count_of(positions: int, per_block: int | None) -> int:
    """R, of a batch of so many positions, padding included."""
    if per_block is not None:
        return per_block
    return 8 if positions <= 65536 else 4


# --- Representatives --------------------------------------------------------------------------------------------------


def _distances(keys: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return ((keys - centre) ** 2).sum(1)


def _cluster(keys: np.ndarray, count: int) -> tuple[list[list[int]], float]:
    """(members of each cluster, closest decision) of keys `[n, D]`."""
    same = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)  # equal keys have equal numbers
    centres, alive, seeds, gap = [], [], [], INF
    shortest = _distances(keys, keys.mean(0))
    for i in range(count):
        seed = int(shortest.argmax())  # the lowest position of the largest
        others = shortest[same != same[seed]]
        if i == 0:
            gap = min(gap, shortest[seed] - others.max(initial=-INF))
        elif not np.isin(same, same[seeds]).all():  # else no key is left, and the distance is 0 for certain
            gap = min(gap, shortest[seed] - others.max(initial=0.0))
        alive.append(i == 0 or shortest[seed] > 0)
        seeds.append(seed)
        centres.append(keys[seed])
        shortest = np.minimum(shortest, _distances(keys, keys[seed]))
    owner = np.zeros(len(keys), int)
    for step in range(ROUNDS + 1):
        apart = ((keys[:, None] - np.stack(centres)) ** 2).sum(2)  # [n, R]
        apart[:, ~np.array(alive)] = INF
        owner = apart.argmin(1)  # the lowest centre of the nearest
        if sum(alive) > 1:
            nearest, second = np.sort(apart, 1)[:, :2].T
            gap = min(gap, float((second - nearest).min()))
        if step < ROUNDS:
            centres = [keys[owner == i].mean(0) if (owner == i).any() else c for i, c in enumerate(centres)]
    members = [[n for n in range(len(keys)) if owner[n] == i] for i in range(count)]
    return members, gap


def _outliers(keys: np.ndarray, count: int) -> tuple[list[list[int]], float]:
    """(the count - 1 farthest keys one by one and the rest, closest decision) of keys `[n, D]`."""
    same = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    distance = _distances(keys, keys.mean(0))
    order = sorted(range(len(keys)), key=lambda n: (-distance[n], n))
    alone, rest = order[: count - 1], sorted(order[count - 1 :])
    gaps = [distance[a] - distance[r] for a in alone for r in rest if same[a] != same[r]]
    members = [[n] for n in alone] + [[] for _ in range(count - 1 - len(alone))] + [rest]
    return members, min(gaps, default=INF)


def represent(keys: np.ndarray, kind: str, count: int) -> Representatives:
    """The representatives of a block's real keys `[n, D]`, n > 0."""
    members, gap = (_cluster if kind == "clusters" else _outliers)(keys, count)
    means, variances = np.zeros((2, count, keys.shape[1]))
    for i, m in enumerate(members):
        if m:
            means[i], variances[i] = keys[m].mean(0), keys[m].var(0)
    size = (keys**2).sum(1).max()
    return Representatives(means, variances, np.array([len(m) for m in members]), gap / size if size > 0 else INF)


# --- Scores -----------------------------------------------------------------------------------------------------------


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis, keepdims=True)
    top = np.where(top == -INF, 0.0, top)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - top).sum(axis)) + top.squeeze(axis)


def _largest_shares(z: np.ndarray) -> np.ndarray:
    """ln X `[blocks]` of z `[rows, blocks]`."""
    return (z - _log_sum_exp(z, 1)[:, None]).max(0)


def _logarithms(z: np.ndarray, unsure: np.ndarray, peak: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """(ln X, margins) of z `[rows, blocks]`; unsure `[blocks]`: whose representatives a near tie decides.

    All shares must fall on the same side of the peak if the unsure blocks' z is off by CLUSTER_SHIFT either way; where
    they do not, the margin is 0.
    """
    log_x = _largest_shares(z)
    cases = [log_x]
    if unsure.any():
        for shift in (-CLUSTER_SHIFT, CLUSTER_SHIFT):
            cases.append(_largest_shares(np.where(unsure, z + shift, z)))
    gaps = np.stack(cases) - math.log(peak)
    return log_x, np.where((gaps > 0).all(0) | (gaps < 0).all(0), np.abs(gaps).min(0), 0.0) / size


# --- The selection ----------------------------------------------------------------------------------------------------


def oracle_select(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    peak: float,
    representatives: str,
    per_block: int | None,
    variance: bool,
    last_full_blocks: int,
    block_size: int,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> PeakOracle:
    """PeakPrefill's selection, by brute force in float64.

    Args:
        query: `[B, Hq, Lq, D]`, the last Lq positions of the keys; any float dtype. key: `[B, Hkv, Lkv, D]`.
        peak, representatives, per_block, variance, last_full_blocks, scale: section 5b's knobs.
        block_size: tokens per block.
        starts: index of each element's first real key, default 0. lengths: number of its real keys.
    """
    n_batch, n_heads, lq, dim = query.shape
    n_kv_heads, lkv = key.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k = (x.detach().cpu().to(torch.float64).numpy() for x in (query, key))
    off, size, group = lkv - lq, block_size, n_heads // n_kv_heads
    shape = (n_batch, n_heads, math.ceil(lq / size), math.ceil(lkv / size))
    keep, by_score = np.zeros(shape, bool), np.zeros(shape, bool)
    peaks, margin = np.zeros(shape), np.full(shape, INF)

    def rounded(means: np.ndarray) -> np.ndarray:
        return torch.from_numpy(means).to(query.dtype).double().numpy()

    for b in range(n_batch):
        start = 0 if starts is None else int(starts[b])
        end = lkv if lengths is None else start + int(lengths[b])
        real_blocks = [j for j in range(shape[3]) if max(j * size, start) < min((j + 1) * size, end)]
        rows = {}  # query block -> positions of its real queries
        for i in range(shape[2]):
            inside = range(off + i * size, min(off + (i + 1) * size, lkv))
            positions = [position for position in inside if start <= position < end]
            if positions:
                rows[i] = positions
        if not rows:
            continue
        last_rows = sorted(rows)[len(rows) - min(last_full_blocks, len(rows)) :]
        count = count_of(lkv, per_block)
        seen = [p - off for p in range(end - 1, max(start, off) - 1, -16)]  # queries whose squares are averaged
        for h_kv in range(n_kv_heads):
            heads = range(h_kv * group, (h_kv + 1) * group)
            squares = np.mean([q[b, h, p] ** 2 for h in heads for p in seen], 0)  # [D]
            made, bias = {}, {}
            for j in real_blocks:
                keys = k[b, h_kv, max(j * size, start) : min((j + 1) * size, end)]
                made[j] = represent(keys, representatives, count)
                with np.errstate(divide="ignore"):
                    bias[j] = np.log(made[j].weights.astype(float))
                if variance:
                    bias[j] += scale**2 / 2 * (made[j].variances @ squares)
            longest = np.sqrt((k[b, h_kv, start:end] ** 2).sum(1).max())
            for h in heads:
                for i, positions in rows.items():
                    vectors = q[b, h, positions[0] - off : positions[-1] - off + 1]  # [rows, D]
                    local = {p // size for p in range(off + i * size, off + (i + 1) * size)}
                    visible = [j for j in real_blocks if j * size <= positions[-1]]
                    z = np.full((len(positions), len(visible)), -INF)
                    exact = {real_blocks[0]} | local
                    for column, j in enumerate(visible):
                        if j in exact:
                            tokens = range(max(j * size, start), min((j + 1) * size, end))
                            future = np.array(tokens) > np.array(positions)[:, None]
                            scores = scale * vectors @ k[b, h_kv, tokens[0] : tokens[-1] + 1].T
                            z[:, column] = _log_sum_exp(np.where(future, -INF, scores), 1)
                        else:
                            z[:, column] = (bias[j] + scale * vectors @ rounded(made[j].means).T).max(1)
                    unsure = np.array([j not in exact and made[j].gap < CLUSTER_TIE for j in visible])
                    error = 1 + abs(scale) * longest * np.sqrt((vectors**2).sum(1).max())
                    log_x, margins = _logarithms(z, unsure, peak, error)
                    for column, j in enumerate(visible):
                        always = j in exact or i in last_rows
                        cell = b, h, i, j
                        peaks[cell] = math.exp(log_x[column])
                        keep[cell] = always or log_x[column] >= math.log(peak)
                        by_score[cell] = not always
                        if not always:
                            margin[cell] = margins[column]
    return PeakOracle(keep, by_score, peaks, margin)
