"""FlashPrefill's selection in plain PyTorch: the specification that the Triton kernels are tested against.

    m[I, J] = max_q s q . k_J      S[I, J] = sum_q exp(s q . k_J - m[I, J])      P[I, J] = S exp(m[I, J] - max_J m)

over the real queries q of row block I that see the last real key of block J; k_J is the mean of J's real keys, rounded
to the inputs' dtype, as the released kernel rounds it. A row keeps J when P[I, J] >= alpha max_J P[I, J], and some
blocks in any case (arXiv 2603.06199, section 3).

Shapes in comments: H query heads, nq row blocks, nk key blocks, B block size, D head dim. Scores and sums are fp32.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from flexprefill_fa.masks.element import Element


def block_scores(element: Element) -> Tensor:
    """P, fp32 [H, nq, nk]; 0 where no row counts.

    A few row blocks at a time: the scores of all queries would be B times the result.
    """
    size, blocks = element.grid.block_size, element.grid.kv_blocks
    pooled = element.per_head(element.pooled_keys().to(element.key.dtype)).float()  # [H, nk, D]
    queries = rearrange(element.query_slots(), "h (i b) d -> h i b d", b=size)
    position = rearrange(element.query_position, "(i b) -> i b 1", b=size)
    real = rearrange(element.real_queries, "(i b) -> i b 1", b=size)
    last_key = (element.key_position[::size] + size).clamp(max=element.grid.keys) - 1  # [nk], of the real ones
    counts = real & (position >= last_key)  # [nq, B, nk]
    parts = []
    for rows in element.row_pieces(4 * element.heads * size * blocks):
        scores = queries[:, rows].float() @ pooled[:, None].mT * element.scale  # [H, rows, B, nk]
        scores = scores.masked_fill(~counts[rows], float("-inf"))
        highest = scores.amax(2)  # m, [H, rows, nk]
        base = highest.masked_fill(highest == float("-inf"), 0.0)
        total = (scores - base[:, :, None]).exp().sum(2)  # S; exp(-inf) = 0 where no row counts
        best = highest.amax(-1, keepdim=True)
        parts.append(total * (highest - best.masked_fill(best == float("-inf"), 0.0)).exp())
    return torch.cat(parts, 1)
