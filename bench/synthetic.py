"""Selections of an exact density, for measuring the attention alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_fa import BlockSelection
from flexprefill_fa.grid import Grid, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.selection import index_lists


def random_selection(
    length: int,
    heads: int,
    density: float,
    *,
    batch: int = 1,
    block_size: int = 128,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockSelection:
    """Exactly `round(density x causal blocks)` blocks per head: diagonal and first column, the rest at random.

    Args:
        length: tokens, queries and keys alike.
        heads, batch: each head of each element draws its own blocks.
        density: kept blocks / causal blocks.
        block_size: tokens per block.
        device: where the lists go; the blocks are the same on every device.
        seed: of the draw.

    Raises:
        ValueError: for a density above 1, or too low for what every row keeps.
    """
    wanted = block_count(length, density, block_size)
    blocks = Grid(length, length, block_size).q_blocks
    always = 2 * blocks - 1
    generator = torch.Generator().manual_seed(seed)
    lists = [_full_lists(blocks, wanted - always, generator) for _ in range(batch * heads)]
    full_count, full_indices = (
        torch.stack(tensors).unflatten(0, (batch, heads)).to(device) for tensors in zip(*lists, strict=True)
    )
    partial_indices = torch.zeros_like(full_indices)
    partial_indices[..., 0] = torch.arange(blocks, device=device)
    return BlockSelection(
        kv_num_blocks=torch.ones_like(full_count),
        kv_indices=partial_indices,
        full_kv_num_blocks=full_count,
        full_kv_indices=full_indices,
        q_len=length,
        kv_len=length,
        block_size=block_size,
    )


def chunk_selection(
    q_len: int,
    kv_len: int,
    heads: int,
    density: float,
    *,
    block_size: int = 128,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockSelection:
    """About `density x causal blocks` blocks per head of a chunk: the diagonal, the first column, others at random.

    Args:
        q_len, kv_len: tokens; the queries are the last of the keys.
        heads: each draws its own blocks.
        density: expected kept blocks / causal blocks; higher where what is always kept is more.
        block_size: tokens per block.
        device: where the lists go; the blocks are the same on every device.
        seed: of the draw.
    """
    grid = Grid(q_len, kv_len, block_size)
    ranges = real_ranges(None, None, 1, kv_len, torch.device("cpu"))
    visible = visible_blocks(grid, ranges)[:, None]  # [1, 1, nq, nk]
    full = unmasked_blocks(grid, ranges)[:, None] & visible
    always = visible & ~full
    always[..., 0] = True
    causal, kept = int(visible.sum()), int(always.sum())
    share = max(0.0, density * causal - kept) / max(1, causal - kept)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(1, heads, grid.q_blocks, grid.kv_blocks, generator=generator) < share
    keep = (drawn & visible) | always
    lists = [part.to(device) for blocks in (keep & ~full, keep & full) for part in index_lists(blocks)]
    return BlockSelection(lists[0], lists[1], lists[2], lists[3], q_len, kv_len, block_size)


def block_count(length: int, density: float, block_size: int = 128) -> int:
    """Kept blocks of each head of a `random_selection`.

    Raises:
        ValueError: for a density above 1, or too low for what every row keeps.
    """
    blocks = Grid(length, length, block_size).q_blocks
    causal, always = blocks * (blocks + 1) // 2, 2 * blocks - 1
    wanted = round(density * causal)
    if not always <= wanted <= causal:
        raise ValueError(
            f"density at {length} tokens must be in [{always / causal:.4g}, 1] (the diagonal and the first block are "
            f"always kept), got {density:g}"
        )
    return wanted


def _full_lists(blocks: int, extra: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Counts int32 `[nq]` and ascending indices int32 `[nq, nq]` of column 0 and `extra` blocks below the diagonal."""
    row = torch.arange(blocks)
    start = (row - 1).clamp(min=0) * (row - 2).clamp(min=0) // 2  # where a row's candidates, columns 1 to I - 1, begin
    candidates = (blocks - 1) * (blocks - 2) // 2
    chosen = torch.randperm(candidates, generator=generator)[:extra].sort().values
    chosen_row = torch.searchsorted(start, chosen, right=True) - 1
    column = chosen - start[chosen_row] + 1
    extras = torch.bincount(chosen_row, minlength=blocks)
    first = extras.cumsum(0) - extras  # rank of a row's first chosen block
    slot = torch.arange(len(chosen)) - first[chosen_row] + 1  # slot 0 is column 0
    indices = torch.zeros(blocks, blocks, dtype=torch.int32)
    indices[chosen_row, slot] = column.to(torch.int32)
    return (extras + (row > 0)).to(torch.int32), indices
