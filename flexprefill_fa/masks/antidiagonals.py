"""Scores of groups of S queries and S keys by sums along antidiagonals (XAttention, arXiv 2503.16428).

    X[r, c] = sum over i < S of q[rS + S - 1 - i] . k[cS + i] s / S

Every query of group r meets one key of group c. A group that padding cuts sums over its real members. One matrix
product of reshaped tensors, 1/S of the products of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from flexprefill_fa.masks.element import Element
from flexprefill_fa.validation import check_integer


def antidiagonal_scores(element: Element, stride: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """X of some query blocks at a time.

    Args:
        element: the sequence. stride: S, which divides the block size.

    Yields:
        The query blocks; X fp32 `[H, rows, groups of a block, nk, groups of a block]`, -inf where a group starts behind
        the last position of the query group, or holds no real key; and bool `[rows, groups of a block]`, the query
        groups with a real query.
    """
    grid, size, device = element.grid, element.grid.block_size, element.device
    per_block, start = size // stride, grid.offset - grid.query_pad
    queries = rearrange(element.query_slots(), "h (r s) d -> h r s d", s=stride).flip(2)
    queries = rearrange(queries, "h (i r) s d -> h i r (s d)", r=per_block)
    keys = rearrange(element.key_slots(), "h (c s) d -> h c (s d)", s=stride)
    # First positions of the groups.
    key_first = torch.arange(0, grid.kv_blocks * size, stride, device=device)
    query_first = torch.arange(start, start + grid.q_blocks * size, stride, device=device).view(-1, per_block)
    real_queries = query_first < grid.keys
    if grid.query_pad:
        real_queries &= query_first + stride > grid.offset
    last = (query_first + (stride - 1)).clamp_(max=grid.keys - 1)  # groups behind it hold no real key
    hidden_before = grid.key_pad // stride  # groups of padding alone
    for rows in element.row_pieces(4 * element.heads * per_block * keys.shape[1]):
        # A stride divides a power of two: scores are divided by it exactly, wherever that is done.
        scores = element.products(rearrange(queries[:, rows], "h i r e -> h (i r) e"), keys, 1 / stride)
        scores = rearrange(scores, "h (i r) c -> h i r c", r=per_block)
        scores.masked_fill_(key_first > last[rows, :, None], -torch.inf)
        if hidden_before:
            scores[..., :hidden_before] = -torch.inf
        yield rows, rearrange(scores, "h i r (j c) -> h i r j c", c=per_block), real_queries[rows]


def share_prefix(weights: Tensor, share: float, before: Tensor | None = None) -> Tensor:
    """The fewest key blocks, largest weight first, that reach a share of a query block's weight.

    Args:
        weights: fp32 `[H, rows, nk]`, 0 for what is not seen. share: of the sum; from 1 on every block is kept.
        before: bool like weights, blocks that come before all others.

    Returns:
        bool like weights. The block that crosses the share is kept; among equals the lower block comes first.
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    if before is not None:
        rank = before.gather(-1, order).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        order, ordered = order.gather(-1, rank), ordered.gather(-1, rank)
    reached = ordered.cumsum(-1).sub_(ordered)  # before each block
    kept = reached < weights.sum(-1, keepdim=True) * share
    return torch.empty_like(kept).scatter_(-1, order, kept)  # all of it: an order names every block


def check_stride(stride: object, block_size: int) -> None:
    """A whole number that divides the block size."""
    check_integer("stride", stride, 1)
    if not isinstance(stride, int) or block_size % stride:
        raise ValueError(f"stride must divide block_size {block_size}, got {stride}")
