"""Attention of the last queries by key and by offset, in plain PyTorch: what several selectors' rules rank.

Shapes in comments: H query heads, R last queries, D head dim, n keys. Scores and sums are fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.masks.element import Element


def last_query_scores(element: Element) -> tuple[Tensor, Tensor]:
    """`vertical` [H, n] by key position and `slash` [H, n] by offset (query - key position); each sums to 1."""
    last = element.query[:, -element.grid.block_size :].float()  # [H, R, D]
    rows, n = last.shape[1], element.grid.keys
    scores = last @ element.per_head(element.key.float()).mT * element.scale  # [H, R, n]
    key_position = torch.arange(n, device=last.device)
    query_position = n - rows + torch.arange(rows, device=last.device)
    masked = (key_position > query_position[:, None]) | (key_position < element.grid.key_pad)
    probability = scores.masked_fill(masked, float("-inf")).softmax(-1)
    vertical = probability.mean(1)
    # Shear: with the rows reversed, row i moves right by i, so that column c holds offset n - 1 - c throughout.
    wide = F.pad(probability.flip(1), (0, rows)).flatten(1)
    sheared = wide[:, : rows * (n + rows - 1)].unflatten(1, (rows, n + rows - 1))
    slash = sheared.sum(1)[:, :n].flip(1) / rows
    return vertical, slash


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """bool like order: True at the first `count` items of each row of an order."""
    ranked = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def top(scores: Tensor, count: Tensor) -> Tensor:
    """bool like scores: True at the `count` largest of each row, lower index first among equals."""
    return first_of(scores.argsort(dim=-1, descending=True, stable=True), count)
