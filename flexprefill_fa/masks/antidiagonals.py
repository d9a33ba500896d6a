"""Scores of groups of S queries and S keys by sums along antidiagonals (XAttention, arXiv 2503.16428).

    X[r, c] = sum over i < S of q[rS + S - 1 - i] . k[cS + i] s / S

Every query of group r meets one key of group c. A group that padding cuts sums over its real members. One matrix
product of reshaped tensors, 1/S of the products of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexprefill_fa.masks.element import Element
from flexprefill_fa.validation import check_integer


def antidiagonal_scores(element: Element, stride: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """X of some query blocks at a time, in their order.

    Args:
        element: the sequence. stride: S, which divides the block size.

    Yields:
        X fp32 `[H, rows, groups of a block, nk, groups of a block]`, -inf where a group starts behind the last position
        of the query group, or holds no real key; and bool `[rows, groups of a block]`, the query groups with a real
        query, None where all of them have one.
    """
    grid, size, device = element.grid, element.grid.block_size, element.device
    per_block, start = size // stride, grid.offset - grid.query_pad
    queries = element.query_slots().unflatten(1, (-1, stride)).flip(2).flatten(2).unflatten(1, (-1, per_block))
    keys = element.key_slots().unflatten(1, (-1, stride)).flatten(2)  # [Hkv, groups, S D]
    real = None
    if grid.query_pad >= stride or start + grid.q_blocks * size - stride >= grid.keys:
        first = torch.arange(start, start + grid.q_blocks * size, stride, device=device).view(-1, per_block)
        real = (first < grid.keys) & (first + stride > grid.offset)
    before, behind = grid.key_pad // stride, (grid.keys - 1) // stride + 1  # groups of padding alone
    for rows in element.row_pieces(4 * element.heads * per_block * keys.shape[1]):
        # A stride divides a power of two: scores are divided by it exactly, wherever that is done.
        scores = element.products(queries[:, rows].flatten(1, 2), keys, 1 / stride)
        # Group c starts behind the last position of group r where c > (start + S - 1) // S + r.
        diagonal = (start + stride - 1) // stride + rows.start * per_block
        scores.masked_fill_(
            torch.ones(scores.shape[1:], dtype=torch.bool, device=device).triu(diagonal + 1), -torch.inf
        )
        if before:
            scores[..., :before] = -torch.inf
        if behind < keys.shape[1]:
            scores[..., behind:] = -torch.inf
        yield scores.unflatten(2, (-1, per_block)).unflatten(1, (-1, per_block)), None if real is None else real[rows]


def share_prefix(weights: Tensor, share: float, before: Tensor | None = None) -> Tensor:
    """The fewest key blocks, largest weight first, that reach a share of a query block's weight.

    Args:
        weights: fp32 `[H, rows, nk]`, none below 0, and 0 for what is not seen.
        share: of the sum; from 1 on every block is kept.
        before: bool like weights, blocks that come before all others.

    Returns:
        bool like weights. The block that crosses the share is kept; among equals the lower block comes first.
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    if before is None:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    else:  # by their bits, which are ordered as they are, those that come later below 0
        bits = weights.view(torch.int32)
        order = torch.where(before, bits, bits | -(2**31)).sort(dim=-1, descending=True, stable=True).indices
        ordered = weights.gather(-1, order)
    reached = ordered.cumsum(-1).sub_(ordered)  # before each block
    kept = reached < weights.sum(-1, keepdim=True) * share
    return torch.empty_like(kept).scatter_(-1, order, kept)  # all of it: an order names every block


def check_stride(stride: object, block_size: int) -> None:
    """A whole number that divides the block size."""
    check_integer("stride", stride, 1)
    if not isinstance(stride, int) or block_size % stride:
        raise ValueError(f"stride must divide block_size {block_size}, got {stride}")
