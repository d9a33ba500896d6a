"""Block maps of one layer's heads as bytes: what was kept, the exact attention, and what of it was missed.

A map is the lower triangle of a square of cells, row by row: cell (r, c) stands for `group` x `group` blocks. With a
group of 1 a cell is a block; with more, the blocks of a cell are pooled: their kept share, and the sum of their
attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAP_BYTES = 32 * 2**20
"""What all maps of a page take at most, in the base64 text of the page and before they are compressed."""

MAX_CELLS = 256
"""Cells along a map's side at most: more would not be seen on a screen."""

DECADES = 5
"""Attention is drawn on a logarithmic scale from 10^-DECADES to 1; less counts as none."""

KINDS = ("kept", "attention", "missed")
"""The maps of a head, in their order in the bytes."""

_BASE64 = 4 / 3  # characters per byte


@dataclass(frozen=True)
class LayerMaps:
    """The maps of one layer's heads.

    Attributes:
        group: blocks along a cell's side.
        cells: cells along a map's side.
        data: uint8, heads x `KINDS` x cells (cells + 1) / 2.
    """

    group: int
    cells: int
    data: bytes


def blocks_per_cell(blocks: int, maps: int, limit: float) -> int:
    """The smallest group with which a layer's maps have at most `MAX_CELLS` cells a side and keep to a limit.

    Args:
        blocks: blocks along a map's side.
        maps: of the layer, of all heads together.
        limit: characters of base64 text.
    """
    values = limit / _BASE64 / maps  # a triangle of c cells a side has c (c + 1) / 2
    most = max(1, min(MAX_CELLS, math.floor((math.sqrt(8 * values + 1) - 1) / 2)))
    return -(-blocks // most)


def layer_maps(keep: Tensor, mass: Tensor, rows: Tensor, group: int) -> LayerMaps:
    """Pool and quantise the maps of one layer.

    Args:
        keep: bool `[H, nb, nb]`, the kept blocks, causal alone.
        mass: float32 `[H, nb, nb]`, the attention probability summed by blocks.
        rows: `[nb]`, the number of rows in each block.
        group: blocks along a cell's side.

    Returns:
        For each cell, "kept" is the kept share of its causal blocks: 0 for none, 255 for all, 1 to 254 between.
        "attention" and "missed" are the share of its rows' probability that falls in it, or in its dropped blocks, see
        `quantise_share`.
    """
    causal = torch.ones_like(keep[:1], dtype=torch.float32).tril()
    share = _pooled(keep.float(), group) / _pooled(causal, group).clamp(min=1)
    kept = (share * 255).round().clamp(1, 254)
    kept = torch.where(share == 0, 0, torch.where(share == 1, 255, kept)).to(torch.uint8)
    short = -len(rows) % group
    count = F.pad(rows.float(), (0, short)).unflatten(0, (-1, group)).sum(-1)[:, None]  # [cells, 1]
    attention = quantise_share(_pooled(mass, group) / count)
    missed = quantise_share(_pooled(mass.masked_fill(keep, 0), group) / count)
    maps = torch.stack((kept, attention, missed), 1)  # [H, 3, cells, cells]
    cells = maps.shape[-1]
    row, column = torch.tril_indices(cells, cells, device=maps.device)
    return LayerMaps(group, cells, bytes(maps[:, :, row, column].flatten().tolist()))


def quantise_share(share: Tensor) -> Tensor:
    """uint8 of shares in [0, 1]: 0 below 10^-DECADES, else 1 + 254 (1 + log10(share) / DECADES)."""
    level = 1 + 254 * (1 + share.clamp(min=1e-30).log10() / DECADES)
    return torch.where(level < 1, 0, level.round().clamp(max=255)).to(torch.uint8)


def _pooled(values: Tensor, group: int) -> Tensor:
    """`[H, nb, nb]` summed over squares of blocks, `[H, cells, cells]`."""
    short = -values.shape[-1] % group
    padded = F.pad(values, (0, short, 0, short))
    return padded.unflatten(-1, (-1, group)).sum(-1).unflatten(-2, (-1, group)).sum(-2)
