"""What a selector's rule sees: one sequence of a batch without its padding, on FlexAttention's blocks.

Positions count from the first position of the first block that holds a real key, so a sequence behind whole blocks of
padding looks the same as one without, but for `batch_keys`. Shapes in comments and docstrings: H query heads, Hkv key
heads, M queries, n positions of keys, D head dim, B block size, nq and nk blocks of queries and keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv

SCORE_BYTES = 2**29  # fp32 scores that a rule should hold at a time


@dataclass(frozen=True)
class SequenceGrid:
    """Where the tokens of one sequence stand among its blocks.

    Attributes:
        queries: M, the real ones, which are the last positions.
        keys: n, from the first position of the first block with a real key to the last real key.
        key_pad: the first so many of them are padding, fewer than B.
        query_pad: the first query is this many rows into its block, fewer than B.
        block_size: B.
        batch_keys: positions of the batch's keys, all padding included.
    """

    queries: int
    keys: int
    key_pad: int
    query_pad: int
    block_size: int
    batch_keys: int

    @property
    def offset(self) -> int:
        """Position of query 0."""
        return self.keys - self.queries

    @property
    def q_blocks(self) -> int:
        return cdiv(self.query_pad + self.queries, self.block_size)

    @property
    def kv_blocks(self) -> int:
        return cdiv(self.keys, self.block_size)

    @property
    def real_keys(self) -> int:
        """How many keys are no padding."""
        return self.keys - self.key_pad


@dataclass(frozen=True, eq=False)
class Element:
    """One sequence: its queries and keys, their grid, and what rules compute of them. Nothing here waits for a GPU.

    Attributes:
        query: `[H, M, D]`, the last M positions of the keys, in the inputs' dtype.
        key: `[Hkv, n, D]`, zero in the first `grid.key_pad` positions. Query head h reads key head h // (H // Hkv).
        grid: where they stand.
        scale: score scale.
        reports: what `report` was told.
    """

    query: Tensor
    key: Tensor
    grid: SequenceGrid
    scale: float
    reports: dict[str, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def groups(self) -> int:
        """Query heads for each key head."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def device(self) -> torch.device:
        return self.query.device

    def report(self, name: str, values: Tensor) -> None:
        """Hand on a number `[H]` for each head, one of the class's `diagnostics`."""
        self.reports[name] = values

    # Tokens in their blocks, zeros where there is none.

    def query_slots(self) -> Tensor:
        """The queries `[H, nq B, D]` with each block filled up; `real_queries` says which are there."""
        grid = self.grid
        return _padded(self.query, grid.query_pad, grid.q_blocks * grid.block_size - grid.query_pad - grid.queries)

    def key_slots(self) -> Tensor:
        """The keys `[Hkv, nk B, D]` with each block filled up; `real_keys` says which are there."""
        return _padded(self.key, 0, self.grid.kv_blocks * self.grid.block_size - self.grid.keys)

    @functools.cached_property
    def query_position(self) -> Tensor:
        """int64 `[nq B]`, of every slot, real or not."""
        grid = self.grid
        return grid.offset - grid.query_pad + torch.arange(grid.q_blocks * grid.block_size, device=self.device)

    @functools.cached_property
    def key_position(self) -> Tensor:
        """int64 `[nk B]`, of every slot, real or not."""
        return torch.arange(self.grid.kv_blocks * self.grid.block_size, device=self.device)

    @functools.cached_property
    def real_queries(self) -> Tensor:
        """bool `[nq B]`."""
        return (self.query_position >= self.grid.offset) & (self.query_position < self.grid.keys)

    @functools.cached_property
    def real_keys(self) -> Tensor:
        """bool `[nk B]`."""
        return (self.key_position >= self.grid.key_pad) & (self.key_position < self.grid.keys)

    # Blocks.

    @functools.cached_property
    def row_first(self) -> Tensor:
        """int64 `[nq]`: position of each query block's first row, padding or not."""
        return self.query_position[:: self.grid.block_size]

    @functools.cached_property
    def row_last(self) -> Tensor:
        """int64 `[nq]`: position of each query block's last real query."""
        return (self.row_first + self.grid.block_size - 1).clamp(max=self.grid.keys - 1)

    def visible(self) -> Tensor:
        """bool `[nq, nk]`: key block J starts no later than the last real query of query block I."""
        grid, size = self.grid, self.grid.block_size
        every = torch.ones(grid.q_blocks, grid.kv_blocks, dtype=torch.bool, device=self.device)
        return every.tril((grid.offset - grid.query_pad + size - 1) // size)

    def first_block(self) -> Tensor:
        """bool `[1, nk]`: the first block."""
        return torch.arange(self.grid.kv_blocks, device=self.device)[None] == 0

    def own_positions(self) -> Tensor:
        """bool `[nq, nk]`: the blocks of the positions of a query block."""
        return self.visible().triu((self.grid.offset - self.grid.query_pad) // self.grid.block_size)

    def first_and_diagonal(self) -> Tensor:
        """bool `[nq, nk]`: both, in fewer launches than by themselves."""
        blocks = self.own_positions()
        blocks[:, 0].fill_(True)
        return blocks

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """J0 and J1, int64 `[nq]`: the key blocks of each query block's first and last position."""
        size = self.grid.block_size
        first, last = (torch.div(x, size, rounding_mode="floor") for x in (self.row_first, self.row_last))
        return first, last

    def last_rows(self, blocks: int) -> Tensor:
        """bool `[nq, 1]`: the last so many query blocks."""
        row = torch.arange(self.grid.q_blocks, device=self.device)
        return (row >= self.grid.q_blocks - blocks)[:, None]

    # Numbers of blocks.

    def per_head(self, values: Tensor) -> Tensor:
        """`[Hkv, ...]` -> `[H, ...]`, each key head for its query heads."""
        return values if self.groups == 1 else repeat(values, "h ... -> (h g) ...", g=self.groups)

    def block_sums(self, values: Tensor) -> Tensor:
        """`[..., n]` by position -> `[..., nk]`, the sum over each key block."""
        size = self.grid.block_size
        return rearrange(F.pad(values, (0, -values.shape[-1] % size)), "... (j b) -> ... j b", b=size).sum(-1)

    def pooled_keys(self) -> Tensor:
        """fp32 `[Hkv, nk, D]`: the mean over each block's real keys."""
        return self._means(self.key_slots(), self.real_keys)

    def pooled_queries(self) -> Tensor:
        """fp32 `[H, nq, D]`: the mean over each block's real queries."""
        return self._means(self.query_slots(), self.real_queries)

    def _means(self, slots: Tensor, real: Tensor) -> Tensor:
        size = self.grid.block_size
        count = rearrange(real, "(j b) -> j b", b=size).sum(-1)
        return rearrange(slots.float(), "h (j b) d -> h j b d", b=size).sum(2) / count[:, None]

    def shares(self, scores: Tensor) -> Tensor:
        """Softmax of scores `[..., nq, nk]` over the key blocks that each query block sees."""
        return scores.masked_fill(~self.visible(), -torch.inf).softmax(-1)

    def products(self, query: Tensor, key: Tensor, share: float = 1.0) -> Tensor:
        """fp32 `[H, m, k]`: share x scale x the products of vectors `[H, m, E]` and `[Hkv, k, E]`, summed in fp32."""
        rows = query.reshape(key.shape[0], -1, query.shape[2])  # the query heads of a key head together
        if query.is_cuda and query.dtype == key.dtype != torch.float32:
            found = torch.bmm(rows, key.mT, out_dtype=torch.float32)
        else:
            found = rows.float() @ key.float().mT
        return found.view(*query.shape[:2], -1).mul_(self.scale * share)

    def row_pieces(self, bytes_per_block: int) -> Iterator[slice]:
        """Slices of the query blocks, each as large as `SCORE_BYTES` allows where one block takes so many."""
        step = max(1, SCORE_BYTES // max(bytes_per_block, 1))
        for first in range(0, self.grid.q_blocks, step):
            yield slice(first, min(first + step, self.grid.q_blocks))


def _padded(tokens: Tensor, before: int, behind: int) -> Tensor:
    """`[H, L, D]` with zeros around the tokens; itself where there are none to add, which F.pad would copy."""
    return F.pad(tokens, (0, 0, before, behind)) if before or behind else tokens


def element_of(
    query: Tensor, key: Tensor, start: int, end: int, grid: Grid, scale: float
) -> tuple[Element, slice, slice] | None:
    """The sequence at positions [start, end), and the rows and columns of blocks that it fills.

    Args:
        query: `[H, Lq, D]`. key: `[Hkv, Lkv, D]`. grid: theirs. scale: score scale.

    Returns:
        None for a sequence without a real query.
    """
    size = grid.block_size
    base = start // size * size
    q_first, q_end = max(start - grid.offset, 0), end - grid.offset
    if q_end <= q_first:
        return None
    keys = key[:, base:end]
    if start > base:
        keys = F.pad(keys[:, start - base :], (0, 0, start - base, 0))
    place = SequenceGrid(q_end - q_first, end - base, start - base, q_first % size, size, grid.kv_len)
    rows, columns = slice(q_first // size, cdiv(q_end, size)), slice(base // size, cdiv(end, size))
    return Element(query[:, q_first:q_end], keys, place, scale), rows, columns
