"""Brute-force oracle for FlexPrefill's block selection (DESIGN.md, section 4), in float64 numpy and plain loops.

It shares no code with the package. Each batch element is looked at in its own coordinates, see `oracle_grid.Element`:
wholly padded leading blocks are dropped, `pad` positions of the first block that is left are padding, and query block r
lies at positions `first[r] ... last[r]` of the keys. Cells are (query block with a real query, key block), `[R, nb]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from oracle_grid import Element, elements_of

INF = math.inf
FP32_TINY = 2.0**-126  # smallest normal fp32
RELEASED_BLOCK = 128  # the released code counts columns and diagonals in 128s, whatever the block size


@dataclass(frozen=True)
class OracleSelection:
    """What `oracle_select` returns; numpy arrays.

    keep: bool `[B, Hq, nq, nk]` over FlexAttention's absolute grid.
    query_aware: bool `[B, Hq]`; False where the element is dense because it is short.
    js_distance: float64 `[B, Hq]`; NaN where the published variant says NaN, 0 where the element is short.
    margin: float64 `[B, Hq]`; how close, relatively, the nearest decision that shapes the selection is to flipping
        (inf: nothing can flip). The value of js_distance shapes it only through the pattern: a head whose distance is
        far above tau has a large margin even where fp32 underflow decides between that distance and NaN.
    """

    keep: np.ndarray
    query_aware: np.ndarray
    js_distance: np.ndarray
    margin: np.ndarray


# --- How close a decision is to flipping ------------------------------------------------------------------------------


def _gap(chosen: float, other: float) -> float:
    """Relative gap of two scores in rank order; 0 where fp32 may have flushed the larger one to zero."""
    return 0.0 if chosen < RELEASED_BLOCK * FP32_TINY else (chosen - other) / chosen


def _prefix_margin(cumsum: np.ndarray, threshold: float, count: int, same: Sequence[bool]) -> float:
    """Distance of `count`, the entries of cumsum before the threshold, to the nearest count c with not same[c].

    cumsum `[N]`; same `[N + 1]`. A higher c needs entry c - 1 to stay below the threshold, a lower c needs entry c
    above it.
    """
    up = next((cumsum[c - 1] - threshold for c in range(count + 1, len(cumsum) + 1) if not same[c]), INF)
    down = next((threshold - cumsum[c] for c in range(count - 1, -1, -1) if not same[c]), INF)
    return max(0.0, min(up, down)) / threshold


def _ranking_margin(scores: np.ndarray, cover: np.ndarray, chosen: int) -> float:
    """Smallest gap across the boundary after `chosen` ranked items whose swap changes what the chosen ones cover.

    scores `[N]` descending; cover bool `[N, cells]`, in the same order.
    """
    if chosen == 0 or chosen == len(scores):
        return INF
    covered = cover[:chosen].any(0)
    margin = INF
    newcomers = np.flatnonzero((cover[chosen:] & ~covered).any(1))
    if len(newcomers):  # an item that covers something new overtakes the last chosen one
        margin = min(margin, _gap(scores[chosen - 1], float(scores[chosen + int(newcomers[0])])))
    # A covered cell is lost when its best item falls below an item that was not chosen and does not cover it.
    best = cover[:chosen, covered].argmax(0)
    rivals = ~cover[chosen:, covered]
    pairs = set(zip(best[rivals.any(0)], rivals.argmax(0)[rivals.any(0)], strict=True))
    return min([margin, *(_gap(float(scores[i]), float(scores[chosen + j])) for i, j in pairs)])


# --- Choosing ---------------------------------------------------------------------------------------------------------


def _descending(scores: np.ndarray) -> np.ndarray:
    """Indices by descending score, ties to the lower index. `[N]`"""
    return np.argsort(-scores, kind="stable")


def _coverage(
    scores: np.ndarray, cover: np.ndarray, threshold: float, keep_crossing: bool, forced: np.ndarray
) -> tuple[np.ndarray, float]:
    """The cells that the highest scores cover up to a cumulative threshold, and the margin of that choice.

    scores `[N]`; cover bool `[N, R, nb]`; forced bool `[R, nb]`, cells that are kept anyway and so decide nothing.
    keep_crossing=True (paper): the shortest prefix with cumsum >= threshold; everything if rounding never reaches it.
    keep_crossing=False (published): the entries with cumsum <= threshold.
    """
    order = _descending(scores)
    ranked = scores[order]
    cumsum = np.cumsum(ranked)
    flat = (cover & ~forced).reshape(len(scores), -1)[order]
    before = int((cumsum < threshold).sum() if keep_crossing else (cumsum <= threshold).sum())

    def size(count: int) -> int:
        return min(count + 1, len(scores)) if keep_crossing else count

    # prefix[c] = the cells that the first c items cover
    prefix = np.concatenate([np.zeros_like(flat[:1]), np.logical_or.accumulate(flat, axis=0)])
    chosen = size(before)
    n_covered = prefix.sum(1)  # prefixes are nested: equal sizes are equal sets
    same = [bool(n_covered[size(c)] == n_covered[chosen]) for c in range(len(scores) + 1)]
    margin = min(_prefix_margin(cumsum, threshold, before, same), _ranking_margin(ranked, flat, chosen))
    return np.asarray(cover[order[:chosen]].any(0)), margin


def _top(scores: np.ndarray, cells: list[np.ndarray], count: int, always: np.ndarray) -> tuple[np.ndarray, float]:
    """Cells of the `count` best of nb columns or block diagonals, number 0 forced (at +inf), and the margin.

    scores `[nb]`; cells nb x bool `[R, nb]`; always bool `[R, nb]`, cells that decide nothing.
    """
    order = 1 + _descending(scores[1:])
    free = cells[0] | always
    cover = np.array([(cells[i] & ~free).ravel() for i in order])
    kept = cells[0].copy()
    for i in order[: count - 1]:
        kept |= cells[i]
    return kept, _ranking_margin(scores[order], cover, count - 1)


def _released_count(scores: np.ndarray, gamma: float, low: int, high: int) -> tuple[int, float]:
    """Published count of columns or diagonals: K // 128 + 1 clamped to [low, high], and its margin. scores `[n]`"""

    def blocks(before: int) -> int:
        tokens = before + 1  # K
        return min(max(tokens // RELEASED_BLOCK + 1, low), high)

    cumsum = np.cumsum(np.sort(scores)[::-1])
    before = int((cumsum <= gamma).sum())
    same = [blocks(c) == blocks(before) for c in range(len(scores) + 1)]
    return blocks(before), _prefix_margin(cumsum, gamma, before, same)


# --- Section 4, step by step ------------------------------------------------------------------------------------------


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; -inf entries get 0."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _last_query_scores(queries: np.ndarray, keys: np.ndarray, el: Element, scale: float):
    """Step 1: vertical `[n']` by key position and slash `[n]` by offset, from the last queries `[R, D]`."""
    n_rows = len(queries)
    position = np.arange(el.n_pos - n_rows, el.n_pos)[:, None]
    j = np.arange(el.n_pos)[None, :]
    p = _softmax(np.where((j <= position) & (j >= el.pad), scale * queries @ keys.T, -INF))  # [R, n']
    slash = np.zeros(el.n_pos)
    for row, pos in zip(p, position[:, 0], strict=True):
        slash[: pos + 1] += row[pos::-1]  # key j sits at offset pos - j
    return p.mean(0), slash[: el.n] / n_rows


def _block_means(x: np.ndarray, groups: list[tuple[int, int]]) -> np.ndarray:
    """Mean vectors `[G, D]` of x `[n, D]` over the half-open ranges."""
    return np.array([x[a:b].mean(0) for a, b in groups])


def _pattern(
    estimate: np.ndarray, exact: np.ndarray, tau: float, block: int, variant: str
) -> tuple[float, bool, float]:
    """Step 2: (D, query-aware, margin) from a_ `[nb]` and a^ `[nb]`."""
    middle = (estimate + exact) / 2
    js = 0.0
    for a in (estimate, exact):
        nonzero = a > 0
        js += 0.5 * float((a[nonzero] * np.log(a[nonzero] / middle[nonzero])).sum())
    distance = math.sqrt(max(js, 0.0))
    below = distance < tau
    margin = abs(distance - tau) if tau > 0 else INF  # no distance is below 0
    if variant == "paper":
        return distance, below, margin

    # Published: an fp32 zero, or JS rounded below 0, gives NaN, and NaN < tau is false.
    underflow = bool((np.concatenate([estimate, exact]).astype(np.float32) == 0).any())
    smallest = min(estimate.min(), exact.min())
    if smallest < 2.0**-152 / block:  # zero in any fp32 implementation: never query-aware
        margin = INF
    elif smallest < block * FP32_TINY:  # zero or not by how subnormals and the sums of a^ are rounded
        margin = 0.0 if below else margin
    elif below:
        margin = min(margin, max(js, 0.0))  # the sign of JS
    if underflow or js < 0:
        return math.nan, False, margin
    return distance, below, margin


def _query_aware_index(q_means, k_means, el: Element, scale: float, gamma: float, variant: str):
    """Step 4 (Algorithm 4): (cells bool `[R, nb]`, A `[R, nb]`, margin)."""
    a = _softmax(np.where(el.causal, scale * q_means @ k_means.T, -INF))
    rows, cols = np.nonzero(el.causal)  # flattened over the whole head
    cover = np.zeros((len(rows), *a.shape), dtype=bool)
    cover[np.arange(len(rows)), rows, cols] = True
    cells, margin = _coverage(a[rows, cols], cover, gamma * len(el.rows), variant == "paper", el.always)
    return cells, a, margin


def _published_cells(vertical, slash, el: Element, *, gamma, min_budget, max_budget, query_aware):
    """Step 3, published: (cells bool `[R, nb]`, margin)."""
    low = math.ceil(min_budget / el.block)
    high = el.nb if max_budget is None else min(math.ceil(max_budget / el.block), el.nb)
    n_columns, column_margin = _released_count(vertical[el.pad :], gamma, low, high)
    n_diagonals, diagonal_margin = _released_count(slash, gamma, low, high)
    if query_aware:  # both counts become the minimum
        n_columns = n_diagonals = low
        column_margin = diagonal_margin = INF

    column_score, diagonal_score = np.zeros(el.nb), np.zeros(el.nb)
    np.add.at(column_score, np.arange(el.n_pos) // el.block, vertical)
    index = el.n_pos - 1 - np.arange(el.n)  # c = n' - 1 - o; its group t is block diagonal nb - 1 - t
    np.add.at(diagonal_score, el.nb - 1 - index // el.block, slash)

    always = el.always
    columns, top_columns = _top(column_score, [el.column(j) for j in range(el.nb)], n_columns, always)
    diagonals, top_diagonals = _top(diagonal_score, [el.block_diagonal(t) for t in range(el.nb)], n_diagonals, always)
    return columns | diagonals, min(column_margin, diagonal_margin, top_columns, top_diagonals)


def _paper_coverage(vertical, slash, el: Element, gamma: float):
    """Step 3, paper: columns and diagonals of the shortest prefixes, (cells bool `[R, nb]`, margin)."""
    block_of = np.arange(el.pad, el.n_pos) // el.block
    columns = np.array([el.column(j) for j in range(el.nb)])
    by_column, column_margin = _coverage(vertical[el.pad :], columns[block_of], gamma, True, el.always)
    by_offset, offset_margin = _coverage(slash, el.offset_cells(), gamma, True, el.always)
    return by_column | by_offset, min(column_margin, offset_margin)


def _paper_budgets(kept: np.ndarray, scores: np.ndarray, el: Element, min_budget: int, max_budget: int | None):
    """Budgets, paper, row by row: (cells, margin) from the cells kept so far and their scores, all `[R, nb]`."""
    kept, margin, always = kept.copy(), INF, el.always
    for r, visible in enumerate(el.j1 + 1):
        order = [j for j in _descending(scores[r]) if j < visible]

        missing = min(math.ceil(min_budget / el.block), visible) - kept[r].sum()
        candidates = [j for j in order if not kept[r, j]]
        if missing > 0:
            kept[r, candidates[:missing]] = True
            if missing < len(candidates):
                margin = min(margin, _gap(scores[r, candidates[missing - 1]], scores[r, candidates[missing]]))

        excess = 0 if max_budget is None else kept[r].sum() - max_budget // el.block
        droppable = [j for j in order if kept[r, j] and not always[r, j]]
        stay = max(0, len(droppable) - excess)
        if excess > 0:
            kept[r, droppable[stay:]] = False
            if 0 < stay < len(droppable):
                margin = min(margin, _gap(scores[r, droppable[stay - 1]], scores[r, droppable[stay]]))
    return kept, margin


def _select_head(q: np.ndarray, k: np.ndarray, el: Element, *, scale, gamma, tau, min_budget, max_budget, variant):
    """One head: (cells bool `[R, nb]`, query_aware, js_distance, margin).

    q `[Lq, D]` is the whole query tensor of the head; k `[n', D]` its keys in the element's coordinates.
    """
    block = el.block
    if el.n <= max(2 * block, math.ceil(min_budget / block) * block) or el.n_queries <= 1:
        return el.causal, False, 0.0, INF

    real_q = q[el.q_index0 : el.q_index0 + el.n_queries]  # the last of them is at position n' - 1
    q_pos0 = el.n_pos - el.n_queries
    last_q = real_q[-min(block, el.n_queries) :]
    vertical, slash = _last_query_scores(last_q, k, el, scale)

    k_means = _block_means(k, [(max(j * block, el.pad), min((j + 1) * block, el.n_pos)) for j in range(el.nb)])
    exact = np.array([vertical[j * block : (j + 1) * block].sum() for j in range(el.nb)])  # a^
    estimate = _softmax(scale * k_means @ last_q.mean(0))  # a_, without a causal mask
    distance, query_aware, margin = _pattern(estimate, exact, tau, block, variant)

    if gamma >= 1 and max_budget is None:  # by definition, whatever the pattern
        return el.causal, query_aware, distance, margin

    kept = el.always
    scores = np.zeros(0)
    if query_aware:
        ranges = [(max(a - q_pos0, 0), b + 1 - q_pos0) for a, b in zip(el.first, el.last, strict=True)]
        cells, scores, part = _query_aware_index(_block_means(real_q, ranges), k_means, el, scale, gamma, variant)
        kept, margin = kept | cells, min(margin, part)

    if variant == "published":
        cells, part = _published_cells(
            vertical, slash, el, gamma=gamma, min_budget=min_budget, max_budget=max_budget, query_aware=query_aware
        )
        return kept | cells, query_aware, distance, min(margin, part)

    if not query_aware:
        cells, part = _paper_coverage(vertical, slash, el, gamma)
        kept, margin = kept | cells, min(margin, part)
        scores = exact[None, :] + np.tensordot(slash, el.offset_cells().astype(np.float64), axes=1)
    kept, part = _paper_budgets(kept, scores, el, min_budget, max_budget)
    return kept, query_aware, distance, min(margin, part)


def oracle_select(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    gamma: float,
    tau: float,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    variant: str,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> OracleSelection:
    """FlexPrefill's selection of section 4, by brute force in float64.

    Args:
        query: `[B, Hq, Lq, D]`, the last Lq positions of the keys; any float dtype.
        key: `[B, Hkv, Lkv, D]`; query head h reads kv head `h // (Hq // Hkv)`.
        gamma, tau, min_budget, max_budget, scale: section 4's knobs; budgets in tokens.
        block_size: tokens per block, B.
        variant: "published" or "paper".
        starts: index of each element's first real key (left padding), default 0.
        lengths: number of each element's real keys, default Lkv - start.
    """
    if variant not in ("published", "paper"):
        raise ValueError(f'variant must be "published" or "paper", got {variant!r}')
    n_batch, n_heads, lq, dim = query.shape
    n_kv_heads, lkv = key.shape[1], key.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k = (x.detach().cpu().to(torch.float64).numpy() for x in (query, key))

    shape = (n_batch, n_heads)
    keep = np.zeros((*shape, math.ceil(lq / block_size), math.ceil(lkv / block_size)), dtype=bool)
    query_aware, js_distance, margin = np.zeros(shape, dtype=bool), np.zeros(shape), np.full(shape, INF)
    for b, el in enumerate(elements_of(n_batch, lq, lkv, block_size, starts, lengths)):
        if len(el.rows) == 0:
            continue
        origin = el.dropped * block_size
        for h in range(n_heads):
            head_keys = k[b, h // (n_heads // n_kv_heads), origin : origin + el.n_pos]
            cells, query_aware[b, h], js_distance[b, h], margin[b, h] = _select_head(
                q[b, h],
                head_keys,
                el,
                scale=scale,
                gamma=gamma,
                tau=tau,
                min_budget=min_budget,
                max_budget=max_budget,
                variant=variant,
            )
            keep[b, h, el.rows, el.dropped : el.dropped + el.nb] = cells
    return OracleSelection(keep, query_aware, js_distance, margin)
