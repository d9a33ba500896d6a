"""FlexPrefill's selection in plain PyTorch: the specification that the Triton kernels are tested against.

Step 1, the attention of the last queries, stands in masks/last_queries.py. Shapes in comments: H query heads, nq query
blocks, nb key blocks, n keys, B block size. Scores, means and sums are fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.last_queries import first_of, last_query_scores, top

if TYPE_CHECKING:
    from flexprefill_fa.masks.flexprefill.config import FlexPrefillConfig


def js_distance(element: Element, vertical: Tensor, variant: str) -> Tensor:
    """Step 2: sqrt of the Jensen-Shannon divergence [H] between pooled and true attention of the last queries."""
    mean_query = element.query[:, -element.grid.block_size :].float().mean(1)  # [H, D]
    mean_key = element.per_head(element.pooled_keys())  # [H, nb, D]
    pooled = ((mean_query[:, None] @ mean_key.mT).squeeze(1) * element.scale).softmax(-1)  # [H, nb]
    true = element.block_sums(vertical)
    middle = (pooled + true) / 2
    terms = torch.stack((pooled * (pooled / middle).log(), true * (true / middle).log()))
    if variant == "paper":  # 0 ln 0 = 0
        return terms.nan_to_num(nan=0.0).sum((0, -1)).div(2).clamp(min=0).sqrt()
    # As released: a zero, or a divergence that rounds below zero, gives NaN, and NaN is below no tau.
    return (terms[0].sum(-1) / 2 + terms[1].sum(-1) / 2).sqrt()


def pooled_attention(element: Element) -> Tensor:
    """Algorithm 4's block scores [H, nq, nb]: softmax over causal blocks of mean query times mean key."""
    return element.shares(element.pooled_queries() @ element.per_head(element.pooled_keys()).mT * element.scale)


def coverage_prefix(scores: Tensor, threshold: float, *, keep_crossing: bool) -> tuple[Tensor, Tensor]:
    """How many of the largest scores [H, m] reach the threshold, and the order (largest first, stable).

    With keep_crossing the shortest prefix whose sum is at least the threshold, else the longest whose sum is at most.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    total = ordered.cumsum(-1)
    threshold32 = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    count = (total < threshold32).sum(-1) + 1 if keep_crossing else (total <= threshold32).sum(-1)
    return count.clamp(max=scores.shape[-1]), order


def query_aware_blocks(element: Element, config: FlexPrefillConfig) -> tuple[Tensor, Tensor]:
    """Algorithm 4: block scores [H, nq, nb] and the blocks that its threshold over the whole head keeps."""
    scores = pooled_attention(element)
    nq = scores.shape[1]
    count, order = coverage_prefix(scores.flatten(1), config.gamma * nq, keep_crossing=config.variant == "paper")
    return scores, first_of(order, count).unflatten(1, (nq, -1)) & element.visible()


def published_blocks(element: Element, config: FlexPrefillConfig, vertical: Tensor, slash: Tensor, aware: Tensor):
    """The released selection [H, nq, nb]: whole columns and whole block diagonals, as many as the counts say."""
    size, nb = config.block_size, element.grid.kv_blocks
    least = cdiv(config.min_budget, size)
    most = nb if config.max_budget is None else min(cdiv(config.max_budget, size), nb)

    def budget(token_scores: Tensor) -> Tensor:
        tokens, _ = coverage_prefix(token_scores, config.gamma, keep_crossing=False)
        blocks = (tokens + 1) // 128 + 1  # 128 whatever the block size, as released
        return torch.where(aware, least, blocks.clamp(least, most))

    column_scores = element.block_sums(vertical)
    column_scores[:, 0] = float("inf")
    columns = top(column_scores, budget(vertical))  # [H, nb]
    # Offsets are grouped from the far end, which misaligns them with the blocks when n is no multiple of B.
    diagonal_scores = element.block_sums(slash.flip(1)).flip(1)
    diagonal_scores[:, 0] = float("inf")
    diagonals = top(diagonal_scores, budget(slash))  # [H, nb], item t: t blocks below the main diagonal

    keep = columns[:, None].expand(-1, len(element.row_last), -1)
    blocks = torch.arange(nb, device=vertical.device)
    for diagonal in element.diagonal():
        below = diagonal[:, None] - blocks  # [nq, nb]
        keep = keep | (diagonals[:, below.clamp(0, nb - 1)] & (below >= 0))
    if aware.any():
        keep = keep | (aware[:, None, None] & query_aware_blocks(element, config)[1])
    return keep


def offset_window_sums(element: Element, values: Tensor) -> Tensor:
    """[H, n] by offset -> [H, nq, nb], the sum over the offsets that pass through each cell."""
    size, nb = element.grid.block_size, element.grid.kv_blocks
    padded = F.pad(values, (2 * size, 2 * size))
    sums = values.new_zeros(values.shape[0], len(element.row_last), nb)
    blocks = torch.arange(nb, device=values.device) * size
    for row, (first, last) in enumerate(zip(element.row_first.tolist(), element.row_last.tolist(), strict=True)):
        low = first - blocks - size + 1  # [nb], the smallest offset from the row block's first query into block J
        window = torch.arange(last - first + size, device=values.device)
        offsets = (low[:, None] + window).clamp(-2 * size, element.grid.keys + 2 * size - 1)
        sums[:, row] = padded[:, offsets + 2 * size].sum(-1)
    return sums


def paper_blocks(element: Element, config: FlexPrefillConfig, vertical: Tensor, slash: Tensor, aware: Tensor):
    """The printed algorithms [H, nq, nb]: cells hit by the covering tokens and offsets, then per-row budgets."""
    size = config.block_size

    def covering(token_scores: Tensor) -> Tensor:
        count, order = coverage_prefix(token_scores, config.gamma, keep_crossing=True)
        return first_of(order, count).float()

    scores = element.block_sums(vertical)[:, None] + offset_window_sums(element, slash)  # [H, nq, nb]
    columns = element.block_sums(covering(vertical)) > 0
    keep = columns[:, None] | (offset_window_sums(element, covering(slash)) > 0)
    if aware.any():
        aware_scores, aware_keep = query_aware_blocks(element, config)
        keep = torch.where(aware[:, None, None], aware_keep, keep)
        scores = torch.where(aware[:, None, None], aware_scores, scores)

    visible, always = element.visible(), element.first_and_diagonal()
    keep = (keep | always) & visible
    least = visible.sum(-1).clamp(max=cdiv(config.min_budget, size))  # [nq]
    candidates = scores.masked_fill(keep | ~visible, float("-inf"))
    keep = keep | (top(candidates, (least - keep.sum(-1)).clamp(min=0)) & visible)
    if config.max_budget is not None:
        room = (config.max_budget // size - always.sum(-1)).clamp(min=0)  # [nq]
        droppable = keep & ~always
        best = top(scores.masked_fill(~droppable, float("-inf")), room.expand(keep.shape[:-1]))
        keep = always | (droppable & best)
    return keep


def keep(element: Element, config: FlexPrefillConfig) -> Tensor:
    """Kept blocks [H, nq, nb] of one sequence; it reports the JS distance [H]."""
    if element.grid.real_keys <= config.dense_tokens or element.grid.queries == 1:
        return element.visible().expand(element.heads, -1, -1)
    vertical, slash = last_query_scores(element)
    distance = js_distance(element, vertical, config.variant)
    element.report("js_distance", distance)
    if config.keeps_everything:
        return element.visible().expand(element.heads, -1, -1)
    blocks = published_blocks if config.variant == "published" else paper_blocks
    return blocks(element, config, vertical, slash, distance < config.tau)
