"""Where queries, keys and blocks stand: the one place that turns padding and offsets into block geometry.

The grid is FlexAttention's absolute one. Queries are the last `q_len` of `kv_len` key positions, so query i stands at
position `offset + i`. Batch element b holds real tokens at positions `[start_b, end_b)`; the rest is padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BLOCKS = 2**15 - 1  # key blocks per row in the kernels that write lists: two counts share an int32


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b (also for symbolic ints)."""
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n >= 1. Triton's own takes 3 us on the host."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Grid:
    """Block grid of one attention call: lengths and block size in tokens."""

    q_len: int
    kv_len: int
    block_size: int

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys."""
        return self.kv_len - self.q_len

    @property
    def q_blocks(self) -> int:
        return cdiv(self.q_len, self.block_size)

    @property
    def kv_blocks(self) -> int:
        return cdiv(self.kv_len, self.block_size)


def real_ranges(starts: Tensor | None, lengths: Tensor | None, batch: int, kv_len: int, device: torch.device) -> Tensor:
    """The real tokens of each batch element, as int32 `[B, 2]` of (start, end), clamped into the keys.

    Only device-side operations: nothing is copied from the host and nothing is waited for.
    """
    start = torch.zeros(batch, dtype=torch.int32, device=device) if starts is None else starts.to(device, torch.int32)
    start = start.clamp(0, kv_len)
    if lengths is None:
        end = torch.full_like(start, kv_len)
    else:
        end = torch.minimum(start + lengths.to(device, torch.int32).clamp(min=0), torch.full_like(start, kv_len))
    return torch.stack((start, end), dim=1)


@torch.library.custom_op("flexprefill_fa::positions", mutates_args=())
def positions(
    query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """int32 `[B + 1]` each: offset, start and end, by which a mask_mod places a query and skips padded keys.

    An operator, because FlexAttention's lowering wants captured tensors in memory, not fused into the graph. Three
    vectors, one item longer than the batch, because the FLASH kernel does not compile an index that is a constant, and
    an index into a single item is one.
    """
    batch = query.shape[0]
    ranges = real_ranges(starts, lengths, batch, key.shape[2], query.device)
    offset = torch.full((batch + 1,), key.shape[2] - query.shape[2], dtype=torch.int32, device=query.device)
    start, end = (torch.zeros_like(offset) for _ in range(2))
    start[:batch], end[:batch] = ranges[:, 0], ranges[:, 1]
    return offset, start, end


@positions.register_fake
def _(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    offset = query.new_empty((query.shape[0] + 1,), dtype=torch.int32)
    return offset, torch.empty_like(offset), torch.empty_like(offset)


def visible_blocks(grid: Grid, ranges: Tensor) -> Tensor:
    """bool `[B, nq, nk]`: blocks that a causal, padding-aware dense attention would have to compute.

    Block (I, J) counts when row block I holds a real query and J holds a real key that I's last real query can see.
    """
    size = grid.block_size
    device = ranges.device
    start, end = ranges[:, :1].long(), ranges[:, 1:].long()  # [B, 1]
    row_first = grid.offset + torch.arange(grid.q_blocks, device=device) * size  # [nq]
    row_end = (row_first + size).clamp(max=grid.kv_len)
    last_real = torch.minimum(row_end, end) - 1  # [B, nq], position of the last real query of each row block
    has_real = last_real >= torch.maximum(row_first, start)
    block_first = torch.arange(grid.kv_blocks, device=device) * size  # [nk]
    holds_key = (block_first + size > start) & (block_first < end)  # [B, nk]
    return has_real[..., None] & holds_key[:, None] & (block_first <= last_real[..., None])


def unmasked_blocks(grid: Grid, ranges: Tensor) -> Tensor:
    """bool `[B, nq, nk]`: blocks without a masked pair: wholly below the causal boundary and wholly real keys."""
    size = grid.block_size
    device = ranges.device
    start, end = ranges[:, 0].long(), ranges[:, 1].long()  # [B]
    row_first = grid.offset + torch.arange(grid.q_blocks, device=device) * size  # [nq]
    block_first = torch.arange(grid.kv_blocks, device=device) * size  # [nk]
    below = block_first[None, :] + size - 1 <= row_first[:, None]  # [nq, nk]
    real = (block_first >= start[:, None]) & (block_first + size <= end[:, None])  # [B, nk]
    return below & real[:, None]


def whole_blocks(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """`visible_blocks` and `unmasked_blocks` of a batch without padding, bool `[1, nq, nk]` each, by three launches."""
    every = torch.ones(1, grid.q_blocks, grid.kv_blocks, dtype=torch.bool, device=device)
    last, below = grid.offset + grid.block_size - 1, grid.offset - grid.block_size + 1
    return every.tril(last // grid.block_size), every.tril(below // grid.block_size)
