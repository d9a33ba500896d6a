"""Around a selector's kernels: its inputs as the kernels take them, and the lists that they fill."""

import torch
from torch import Tensor

from flexprefill_fa.grid import MAX_BLOCKS, Grid, next_power_of_2, real_ranges
from flexprefill_fa.index_lists import PARTIAL
from flexprefill_fa.kernels.common import unit_stride, unpadded_ranges


def prepare(
    query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Query and key with adjacent items in D, the block grid, and the real ranges int32 `[B, 2]`.

    Raises:
        ValueError: for more key blocks than the row writer can count.
    """
    grid = Grid(query.shape[2], key.shape[2], block_size)
    if grid.kv_blocks > MAX_BLOCKS:
        raise ValueError(
            f"at most {MAX_BLOCKS} key blocks of {block_size} tokens can be selected from, got {grid.kv_blocks}"
        )
    batch, device = query.shape[0], query.device
    if starts is None and lengths is None:
        ranges = unpadded_ranges(batch, grid.kv_len, device)
    else:
        ranges = real_ranges(starts, lengths, batch, grid.kv_len, device)
    return unit_stride(query), unit_stride(key), grid, ranges


def empty_lists(batch: int, heads: int, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten kv_num_blocks, full_kv_num_blocks and the indices of both lists, see `index_lists.py`."""
    shape = (batch, heads, grid.q_blocks)
    count, full_count = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    return count, full_count, torch.empty(*shape, PARTIAL + grid.kv_blocks, dtype=torch.int32, device=device)


def row_constants(grid: Grid, all_partial: bool, zero_tails: bool) -> dict[str, int]:
    """Constants of the kernels that write rows."""
    return {
        "BLOCK": grid.block_size,
        "WIDTH": next_power_of_2(grid.kv_blocks),
        "ALL_PARTIAL": all_partial,
        "ZERO_TAILS": zero_tails,
    }
