"""PeakPrefill's rule in plain PyTorch: the specification that the Triton kernels are tested against.

    z_q[J] = max_i (bias_{J,i} + s q . r_{J,i})        of the representatives r_{J,i} of key block J
    p_q[J] = exp(z_q[J] - logsumexp_J z_q[J])
    X[I, J] = max of p_q[J] over the real queries q of I

A query block I keeps J where X[I, J] >= peak. The first block and the blocks that hold a position of I are kept in any
case; z of those is the exact log-sum-exp over the keys that q sees. All others that q sees lie wholly before I.

Shapes in comments: H query heads, nq query blocks, nk key blocks, R representatives, B block size, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.peakprefill.representatives import representatives
from flexprefill_fa.masks.shares import BlockShares

if TYPE_CHECKING:
    from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig


def peak_shares(element: Element, config: PeakPrefillConfig) -> Tensor:
    """X, fp32 `[H, nq, nk]`; 0 for blocks that no real query of I sees."""
    seen = representatives(element, config)
    return torch.cat([shares.amax(2).exp() for _, shares in log_shares(element, *seen)], 1)


def block_shares(element: Element, config: PeakPrefillConfig) -> BlockShares:
    """X, the row with that share, and the representative through which it sees the block."""
    vectors, bias = representatives(element, config)
    block, own = torch.arange(element.grid.kv_blocks, device=element.device), element.diagonal()[0]
    parts = []
    for rows, shares in log_shares(element, vectors, bias):
        share, row = shares.max(2)  # [H, rows, nk]
        scores = [
            representative_scores(element, rows, vectors, bias, i).gather(2, row[:, :, None])[:, :, 0]
            for i in range(vectors.shape[2])
        ]
        by_keys = (block == 0) | (block >= own[rows, None])  # [rows, nk]
        parts.append((share.exp(), row, (torch.stack(scores).argmax(0) + 1).masked_fill(by_keys, 0)))
    share, row, representative = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return BlockShares(share, "of one query's attention", "peak", row, representative)


def log_shares(element: Element, vectors: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """ln p of some query blocks at a time.

    Args:
        element: the sequence. vectors `[Hkv, nk, R, D]`, bias `[Hkv, nk, R]`: its `representatives`.

    Yields:
        The query blocks; fp32 `[H, rows, B, nk]`, minus infinity for padded queries and what a query does not see.
    """
    grid, size = element.grid, element.grid.block_size
    real = rearrange(element.real_queries, "(i b) -> i b 1", b=size)
    block = torch.arange(grid.kv_blocks, device=element.device)
    first, last = (place.clamp(min=0) for place in element.diagonal())  # [nq]
    aligned = (grid.offset - grid.query_pad) % size == 0  # a query block's positions fill one key block
    for rows in element.row_pieces(4 * element.heads * size * (2 * grid.kv_blocks + 3 * size)):
        scores = representative_scores(element, rows, vectors, bias, 0)
        for i in range(1, vectors.shape[2]):
            scores = torch.maximum(scores, representative_scores(element, rows, vectors, bias, i))
        scores.masked_fill_((block >= first[rows, None])[:, None], -torch.inf)
        own = [first[rows]] if aligned else [first[rows], last[rows]]
        for places in (torch.zeros_like(first[rows]), *own):
            exact = exact_scores(element, rows, places)  # [H, rows, B]
            scores.scatter_(3, places[:, None, None].expand(*exact.shape, 1), exact[..., None])
        shares = scores - scores.logsumexp(-1, keepdim=True)
        yield rows, shares.masked_fill(~real[rows], -torch.inf)


def representative_scores(element: Element, rows: slice, vectors: Tensor, bias: Tensor, i: int) -> Tensor:
    """bias_i + s q . r_i of some query blocks, fp32 `[H, rows, B, nk]`."""
    size = element.grid.block_size
    some = element.query_slots()[:, rows.start * size : rows.stop * size]
    scores = element.products(some, vectors[:, :, i]).add_(element.per_head(bias[..., i])[:, None])
    return rearrange(scores, "h (i b) j -> h i b j", b=size)


def exact_scores(element: Element, rows: slice, places: Tensor) -> Tensor:
    """Log-sum-exp of each query's scores with the keys that it sees of one key block.

    Args:
        element: the sequence. rows: query blocks. places: int64 `[rows]`, the key block of each.

    Returns:
        fp32 `[H, rows, B]`, minus infinity where the query sees none.
    """
    size = element.grid.block_size
    queries = rearrange(element.query_slots(), "(h g) (i b) d -> h i (g b) d", g=element.groups, b=size)[:, rows]
    keys = rearrange(element.key_slots(), "h (j b) d -> h j b d", b=size)[:, places]
    scores = rearrange(queries.float() @ keys.float().mT, "h i (g b) k -> (h g) i b k", g=element.groups)
    position = rearrange(element.query_position, "(i b) -> i b 1", b=size)[rows]
    seen = (rearrange(element.key_position, "(j k) -> j 1 k", k=size)[places] <= position) & rearrange(
        element.real_keys, "(j k) -> j 1 k", k=size
    )[places]
    return (scores * element.scale).masked_fill(~seen, -torch.inf).logsumexp(-1)
