"""A selector that runs in full and whose choice is then replaced by seeded random blocks of a stated density.

Models with random weights have no attention pattern, so what a selector finds in them says nothing about its cost on
real prompts; what selecting costs, and what attending over a density costs, can be measured all the same. This selector
lives in the benchmarks alone. It runs wherever a selector does, inside compiled models too.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.synthetic import chunk_selection
from bench.timing import Timer
from flexprefill_fa.grid import Grid, real_ranges, visible_blocks
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.selector import Lists, Selector, traced_lists

_made: weakref.WeakValueDictionary[int, StandIn] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class StandIn(Selector, name="stand_in", register=False):
    """A selector config around another one, `inner`, which runs in full and is timed by `selecting`, `calls` times.

    Blocks of a density take the place of its choice (at least what every row keeps: its diagonal and the first block),
    one draw for each shape, the same for every layer; None keeps the choice.
    """

    name: ClassVar[str] = "stand_in"

    def __init__(self, inner: Any, density: float | None, seed: int, device: torch.device) -> None:
        self.inner = inner
        self.block_size = inner.block_size
        self.density = density
        self.seed = seed
        self.selecting = Timer(device)
        self.calls = 0
        self._kept: list[Tensor] = []
        self._causal = 0
        self._number = next(_numbers)
        _made[self._number] = self

    @property
    def dense_tokens(self) -> int:
        """As the inner selector's."""
        return self.inner.dense_tokens

    def expected_density(self, tokens: int) -> float:
        """The stated density, or what the inner selector expects."""
        return self.inner.expected_density(tokens) if self.density is None else self.density

    def settings(self) -> Tensor:
        """Its number, then the inner selector's: one compiled graph serves them all."""
        return torch.cat((torch.tensor([self._number], dtype=torch.float64, device="cpu"), self.inner.settings()))

    @classmethod
    def operator(cls) -> Any:
        """As `Selector.operator`."""
        return _stand_in

    def forget(self) -> None:
        """Start counting anew."""
        self.calls, self._kept, self._causal = 0, [], 0
        self.selecting.take_ms()

    def kept_density(self) -> float:
        """Kept blocks / causal blocks of all calls since `forget`, over all heads; reads back from the GPU."""
        return float(torch.stack(self._kept).sum()) / self._causal

    def run(
        self, query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, settings: Tensor, *rest: Any
    ) -> Lists:
        """What the operator does."""
        self.calls += 1
        with self.selecting.once():
            lists = self.inner.operator()(query, key, starts, lengths, settings, *rest)[:3]
        if self.density is not None:
            lists = self._replaced(lists, query.shape[2], key.shape[2])
        self._kept.append((lists[0] + lists[1]).sum())
        heads = query.shape[0] * query.shape[1]
        self._causal += heads * _causal_blocks(query.shape[2], key.shape[2], self.block_size)
        return lists

    def _replaced(self, lists: Lists, q_len: int, kv_len: int) -> Lists:
        """New lists of the same shapes: a compiled graph may reuse the memory of what an operator returns."""
        batch, heads, _ = lists[0].shape
        assert self.density is not None
        chosen = _blocks(q_len, kv_len, heads, self.density, self.block_size, lists[0].device, self.seed)
        count, partial, full_count, full = chosen
        found = count.repeat(batch, 1, 1), full_count.repeat(batch, 1, 1), torch.zeros_like(lists[2])
        _, indices, _, full_indices = both_lists(found)
        indices[..., : partial.shape[-1]], full_indices[..., : full.shape[-1]] = partial, full
        return found


@functools.cache
def _blocks(
    q_len: int, kv_len: int, heads: int, density: float, block_size: int, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """The lists of one shape, cut to the longest row."""
    found = chunk_selection(q_len, kv_len, heads, density, block_size=block_size, device=device, seed=seed)
    pairs = (found.kv_num_blocks, found.kv_indices), (found.full_kv_num_blocks, found.full_kv_indices)
    return tuple(
        part for count, indices in pairs for part in (count, indices[..., : max(1, int(count.max()))].contiguous())
    )


@functools.cache
def _causal_blocks(q_len: int, kv_len: int, block_size: int) -> int:
    """Of one head."""
    grid = Grid(q_len, kv_len, block_size)
    return int(visible_blocks(grid, real_ranges(None, None, 1, kv_len, torch.device("cpu"))).sum())


@torch.library.custom_op("flexprefill_fa_bench::stand_in", mutates_args=())
def _stand_in(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    settings: Tensor,
    scale: float | None,
    block_size: int,
    all_partial: bool,
    zero_tails: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stand_in = _made[int(settings[0])]
    rest = (scale, block_size, all_partial, zero_tails)
    count, full_count, indices = stand_in.run(query, key, starts, lengths, settings[1:], *rest)
    return count, full_count, indices


@_stand_in.register_fake
def _(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
    return traced_lists(query, key, block_size, 0)
