"""Selections of a given density, for measuring the attention alone."""

from __future__ import annotations

import torch

from flexprefill_fa import BlockSelection
from flexprefill_fa.grid import Grid, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.index_lists import both_lists, shared_lists


def chunk_selection(
    q_len: int,
    kv_len: int,
    heads: int,
    density: float,
    *,
    batch: int = 1,
    block_size: int = 128,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockSelection:
    """`round(density x causal blocks)` blocks per head: the diagonal, the first column, others at random.

    The queries are the last `q_len` of `kv_len` keys. Each head of each element draws its own blocks, the same on every
    device. The density is higher where what is always kept is more.
    """
    grid = Grid(q_len, kv_len, block_size)
    ranges = real_ranges(None, None, 1, kv_len, torch.device("cpu"))
    visible = visible_blocks(grid, ranges)[0]  # [nq, nk]
    full = unmasked_blocks(grid, ranges)[0] & visible
    always = visible & ~full
    always[:, 0] = True
    free = (visible & ~always).flatten().nonzero()[:, 0]
    extra = max(0, round(density * int(visible.sum())) - int(always.sum()))
    generator = torch.Generator().manual_seed(seed)
    full = full.to(device)
    lists = []
    for _ in range(batch * heads):  # one at a time: a long prompt's blocks are many
        keep = always.flatten().clone()
        keep[free[torch.randperm(len(free), generator=generator)[:extra]]] = True
        keep = keep.view(1, 1, *visible.shape).to(device)
        lists.append(shared_lists(keep & ~full, keep & full))
    parts = tuple(torch.cat(tensors, 1).unflatten(1, (batch, heads))[0] for tensors in zip(*lists, strict=True))
    return BlockSelection(*both_lists(parts), q_len, kv_len, block_size)
