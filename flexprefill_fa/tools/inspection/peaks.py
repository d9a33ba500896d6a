"""Which row needs a block most, and through which representative it sees it: of layers that run PeakPrefill.

A byte each, for every causal (query block, key block): the row of the query block that gives the key block its largest
share, and the number of the representative by which it scores, from 1; 0 where the block is scored by all of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.masks.element import Element, element_of
from flexprefill_fa.masks.peakprefill import PeakPrefillConfig
from flexprefill_fa.masks.peakprefill.reference import log_shares, representative_scores
from flexprefill_fa.masks.peakprefill.representatives import representatives

PARTS = ("row", "representative")
"""What a layer's bytes hold of each head, in their order."""


@dataclass(frozen=True)
class Peaks:
    """Of every head and block: int64 `[H, nb, nb]`, without meaning above the diagonal."""

    row: Tensor
    representative: Tensor

    def data(self) -> bytes:
        """uint8, heads x `PARTS` x nb (nb + 1) / 2: the lower triangle, row by row."""
        parts = torch.stack((self.row, self.representative), 1).to(torch.uint8)
        row, column = torch.tril_indices(parts.shape[-2], parts.shape[-1], device=parts.device)
        return bytes(parts[:, :, row, column].flatten().tolist())


def block_peaks(query: Tensor, key: Tensor, config: PeakPrefillConfig, scale: float) -> Peaks:
    """By the rule in plain PyTorch, for a prompt in one piece.

    Args:
        query: `[H, n, D]`. key: `[Hkv, n, D]`. config: the selector's. scale: of the scores.
    """
    grid = Grid(query.shape[1], key.shape[1], config.block_size)
    found = element_of(query, key, 0, key.shape[1], grid, scale)
    if found is None:
        raise ValueError("query and key must have at least one token, got none")
    element: Element = found[0]
    vectors, bias = representatives(element, config)
    block, own = torch.arange(element.grid.kv_blocks, device=element.device), element.diagonal()[0]
    rows_of, numbers = [], []
    for rows, shares in log_shares(element, vectors, bias):
        row = shares.argmax(2)  # [H, rows, nk]
        scores = [
            representative_scores(element, rows, vectors, bias, i).gather(2, row[:, :, None])[:, :, 0]
            for i in range(vectors.shape[2])
        ]
        by_keys = (block == 0) | (block >= own[rows, None])  # [rows, nk]
        rows_of.append(row)
        numbers.append((torch.stack(scores).argmax(0) + 1).masked_fill(by_keys, 0))
    return Peaks(torch.cat(rows_of, 1), torch.cat(numbers, 1))
