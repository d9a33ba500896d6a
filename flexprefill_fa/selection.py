"""BlockSelection: which key blocks each query block computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexprefill_fa.exact import exact_probabilities
from flexprefill_fa.grid import Grid, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.index_lists import both_lists, kept_table, shared_lists
from flexprefill_fa.validation import check_query_key


def check_selection(selection: object) -> None:
    """A BlockSelection, or a TypeError that says what was expected."""
    if not isinstance(selection, BlockSelection):
        raise TypeError(
            f"a selection must be a BlockSelection, as select_blocks returns, got {type(selection).__name__}"
        )


@dataclass(frozen=True, repr=False)
class BlockSelection:
    """The blocks that a selector kept for one attention call, in FlexAttention's two lists.

    A block is in the full list when no pair in it is masked, else in the partial list; never in both. Counts are
    int32 `[B, Hq, nq]`, indices int32 `[B, Hq, nq, W]`, ascending; entries past a count mean nothing.

    The indices that a selector makes are two views of one int32 `[B, Hq, nq, 4 + nk]`, the partial list from column 0
    and the full list from column 4, so that both take the memory of one: an entry past a list's count may be one of
    the other list. Indices of your own may be tensors apart, of the same strides, their rows at one distance.

    Attributes:
        kv_num_blocks, kv_indices: the partial blocks, where the mask is evaluated.
        full_kv_num_blocks, full_kv_indices: the full blocks.
        q_len, kv_len: lengths in tokens; queries are the last `q_len` of the keys.
        block_size: tokens per block.
        starts, lengths: int `[B]`, first real key and number of real keys of each element, None without padding.
        all_partial: whether every kept block is in the partial list, as a mask_mod that may mask anywhere needs.
        diagnostics: float32 `[B, Hq]` by name, what the selector reported of each head.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_len: int
    kv_len: int
    block_size: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    all_partial: bool = False
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        found: tuple[Tensor, ...],
        names: Sequence[str],
        query: Tensor,
        key: Tensor,
        block_size: int,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
        all_partial: bool = False,
    ) -> BlockSelection:
        """What a selector's operator found for `[B, Hq, Lq, D]` and `[B, Hkv, Lkv, D]`; names: its diagnostics."""
        reports = dict(zip(names, found[3:], strict=True))
        place = (query.shape[2], key.shape[2], block_size, starts, lengths, all_partial)
        return cls(*both_lists(found), *place, reports)

    @property
    def js_distance(self) -> Tensor:
        """float32 `[B, Hq]`: the Jensen-Shannon distance of FlexPrefill's pattern test.

        NaN where it is not defined for a head, zeros where a selector has no such test.
        """
        found = self.diagnostics.get("js_distance")
        return torch.zeros_like(self.kv_num_blocks[..., 0], dtype=torch.float32) if found is None else found

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four index tensors."""
        return self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices

    @property
    def grid(self) -> Grid:
        return Grid(self.q_len, self.kv_len, self.block_size)

    @property
    def ranges(self) -> Tensor:
        """int32 `[B, 2]`: (start, end) of each element's real tokens."""
        batch, device = self.kv_num_blocks.shape[0], self.kv_num_blocks.device
        return real_ranges(self.starts, self.lengths, batch, self.kv_len, device)

    def kept_blocks(self) -> Tensor:
        """int64 `[B, Hq]`: number of blocks kept by each head."""
        return (self.kv_num_blocks + self.full_kv_num_blocks).sum(-1)

    def density(self) -> Tensor:
        """float32 `[B, Hq]`: kept blocks / blocks that dense causal attention computes."""
        causal = visible_blocks(self.grid, self.ranges).sum((-2, -1))
        return self.kept_blocks() / causal.clamp(min=1)[:, None]

    def to_dense(self) -> Tensor:
        """bool `[B, Hq, nq, nk]`: True where a block is kept."""
        return kept_table(*self.lists, self.grid.kv_blocks)

    def real_rows(self) -> Tensor:
        """int64 `[B]`: the number of rows that hold a real query."""
        position = self.grid.offset + torch.arange(self.q_len, device=self.kv_num_blocks.device)
        return ((position >= self.ranges[:, :1]) & (position < self.ranges[:, 1:])).sum(-1)

    def recall(self, query: Tensor, key: Tensor, *, scale: float | None = None, softcap: float | None = None) -> Tensor:
        """Share of the exact attention probability that falls in kept blocks.

        Computes dense causal attention scores, a few row blocks at a time: for inspection, not for the hot path.

        Args:
            query: `[B, Hq, q_len, D]`. key: `[B, Hkv, kv_len, D]`. The tensors the selection was made from.
            scale: score scale, default 1/sqrt(D).
            softcap: what the attention caps its scaled scores to, None for no cap.

        Returns:
            float32 `[B, Hq]`, the mean over the rows that hold a real query (0 for an element without one).
        """
        check_query_key(query, key)
        expected = (self.q_len, self.kv_len, *self.kv_num_blocks.shape[:2])
        if (query.shape[2], key.shape[2], query.shape[0], query.shape[1]) != expected:
            raise ValueError(
                "recall needs the query and key the selection was made from: expected (q_len, kv_len, batch, heads) = "
                f"{expected}, got {(query.shape[2], key.shape[2], query.shape[0], query.shape[1])}"
            )
        groups, size = query.shape[1] // key.shape[1], self.block_size
        keep = self.to_dense().unflatten(1, (-1, groups))  # [B, Hkv, G, nq, nk]
        total = torch.zeros(keep.shape[:3], device=query.device)
        pieces = exact_probabilities(
            query, key, size, scale=scale, softcap=softcap, starts=self.starts, lengths=self.lengths
        )
        for head, first, probability in pieces:
            rows, seen = probability.shape[2], probability.shape[3] // size
            row_block = torch.arange(first, first + rows, device=query.device) // size
            mass = probability.unflatten(-1, (-1, size)).sum(-1)  # [B, G, rows, blocks]
            total[:, head] += mass.mul_(keep[:, head][:, :, row_block, :seen]).sum((-2, -1))
        return total.flatten(1) / self.real_rows().clamp(min=1)[:, None]

    def __repr__(self) -> str:
        batch, heads = self.kv_num_blocks.shape[:2]
        density = self.density()
        padded = "" if self.starts is None and self.lengths is None else ", padded"
        return (
            f"BlockSelection(batch={batch}, heads={heads}, q_len={self.q_len}, kv_len={self.kv_len}, "
            f"block_size={self.block_size}{padded}, density={density.mean():.3f} "
            f"[{density.min():.3f}, {density.max():.3f}], {self.kv_num_blocks.device})"
        )


def every_block(
    query: Tensor, key: Tensor, block_size: int, starts: Tensor | None = None, lengths: Tensor | None = None
) -> BlockSelection:
    """The selection that dense causal attention amounts to: every block that a row can see, in every head.

    Args:
        query: `[B, Hq, Lq, D]`. key: `[B, Hkv, Lkv, D]`.
        block_size: tokens per block.
        starts, lengths: padding, int `[B]`, as for `BlockSelection`.
    """
    grid = Grid(query.shape[2], key.shape[2], block_size)
    batch, heads = query.shape[:2]
    ranges = real_ranges(starts, lengths, batch, grid.kv_len, query.device)
    visible = visible_blocks(grid, ranges)
    full = visible & unmasked_blocks(grid, ranges)

    found = shared_lists((visible & ~full)[:, None], full[:, None])
    found = tuple(x.repeat(1, heads, *[1] * (x.dim() - 2)) for x in found)
    return BlockSelection.of(found, (), query, key, block_size, starts, lengths)
