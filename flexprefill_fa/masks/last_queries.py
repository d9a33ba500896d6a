"""Attention of the last queries by key and by offset, in plain PyTorch: what several selectors' references rank.

One batch element at a time, in the element's own coordinates: wholly padded leading key blocks are dropped, so
position 0 is the first position of the first block that holds a real key, and the element has `n` positions of which
the first `pad` take no part. Shapes in comments: H query heads, R last queries, M real queries, D head dim,
nb key blocks, nq query blocks that hold a real query, B block size. Scores, means and sums are fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv


@dataclass(frozen=True)
class Element:
    """One batch element in its own coordinates."""

    query: Tensor  # [H, M, D], the real queries, fp32
    key: Tensor  # [H, n, D], repeated per query head, fp32
    pad: int  # leading positions without a real key, fewer than B
    row_first: Tensor  # [nq], position of each row block's first query, padded or not
    row_last: Tensor  # [nq], position of its last real query
    scale: float
    block_size: int

    @property
    def n(self) -> int:
        return self.key.shape[1]

    @property
    def nb(self) -> int:
        return cdiv(self.n, self.block_size)

    def block_mean(self, values: Tensor, first: int) -> Tensor:
        """Mean over each block of values [H, m, D] whose item 0 stands `first` positions into a block."""
        size = self.block_size
        count = values.shape[1]
        padded = F.pad(values, (0, 0, first, -(first + count) % size)).unflatten(1, (-1, size))
        real = F.pad(values.new_ones(count), (first, -(first + count) % size)).unflatten(0, (-1, size)).sum(-1)
        return padded.sum(2) / real[:, None]

    def visible(self) -> Tensor:
        """bool [nq, nb]: block J starts no later than the last real query of row block I."""
        blocks = torch.arange(self.nb, device=self.key.device) * self.block_size
        return blocks <= self.row_last[:, None]

    def always_kept(self) -> Tensor:
        """bool [nq, nb]: the first block and the block(s) on the diagonal."""
        blocks = torch.arange(self.nb, device=self.key.device)
        first = torch.div(self.row_first, self.block_size, rounding_mode="floor")[:, None]
        last = torch.div(self.row_last, self.block_size, rounding_mode="floor")[:, None]
        return ((blocks == 0) | (blocks == first) | (blocks == last)) & self.visible()


def element_of(
    query: Tensor, key: Tensor, start: int, end: int, grid: Grid, scale: float
) -> tuple[Element, slice, slice] | None:
    """The element's tensors and the rows and columns of the absolute grid that it fills; None without a real query."""
    size = grid.block_size
    base = start // size * size
    q_first, q_end = max(start - grid.offset, 0), end - grid.offset
    if q_end <= q_first:
        return None
    rows = slice(q_first // size, cdiv(q_end, size))
    row_first = grid.offset - base + torch.arange(rows.start, rows.stop, device=key.device) * size
    element = Element(
        query=query[:, q_first:q_end].float(),
        key=key[:, base:end].float().repeat_interleave(query.shape[0] // key.shape[0], 0),
        pad=start - base,
        row_first=row_first,
        row_last=torch.clamp(row_first + size - 1, max=end - base - 1),
        scale=scale,
        block_size=size,
    )
    return element, rows, slice(base // size, cdiv(end, size))


def last_query_scores(element: Element) -> tuple[Tensor, Tensor]:
    """`vertical` [H, n] by key position and `slash` [H, n] by offset (query - key position); each sums to 1."""
    last = element.query[:, -element.block_size :]  # [H, R, D]
    rows, n = last.shape[1], element.n
    scores = last @ element.key.mT * element.scale  # [H, R, n]
    key_position = torch.arange(n, device=last.device)
    query_position = n - rows + torch.arange(rows, device=last.device)
    masked = (key_position > query_position[:, None]) | (key_position < element.pad)
    probability = scores.masked_fill(masked, float("-inf")).softmax(-1)
    vertical = probability.mean(1)
    # Shear: with the rows reversed, row i moves right by i, so that column c holds offset n - 1 - c throughout.
    wide = F.pad(probability.flip(1), (0, rows)).flatten(1)
    sheared = wide[:, : rows * (n + rows - 1)].unflatten(1, (rows, n + rows - 1))
    slash = sheared.sum(1)[:, :n].flip(1) / rows
    return vertical, slash


def block_sums(values: Tensor, block_size: int) -> Tensor:
    """[H, n] -> [H, nb], the sum over each block."""
    return F.pad(values, (0, -values.shape[1] % block_size)).unflatten(1, (-1, block_size)).sum(-1)


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """bool like order: True at the first `count` items of each row of an order."""
    ranked = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def top(scores: Tensor, count: Tensor) -> Tensor:
    """bool like scores: True at the `count` largest of each row, lower index first among equals."""
    return first_of(scores.argsort(dim=-1, descending=True, stable=True), count)
