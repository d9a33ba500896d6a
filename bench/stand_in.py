"""A selector that runs in full and whose choice is then replaced by seeded random blocks of a stated density.

Models with random weights have no attention pattern, so what a selector finds in them says nothing about its cost on
real prompts; what selecting costs, and what attending over a density costs, can be measured all the same. This selector
lives in the benchmarks alone. It runs wherever a selector does, inside compiled models too.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.synthetic import chunk_selection
from bench.timing import Timer
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.selector import Lists, Selector, traced_lists

_made: weakref.WeakValueDictionary[int, StandIn] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class StandIn(Selector, name="stand_in", register=False):
    """A selector config around another one, `inner`, which runs in full and is timed by `selecting`, `calls` times.

    Blocks of a density take the place of its choice (at least what every row keeps: its diagonal and the first block),
    one draw for each shape, the same for every layer.
    """

    name: ClassVar[str] = "stand_in"

    def __init__(self, inner: Any, density: float, seed: int, device: torch.device) -> None:
        self.inner = inner
        self.block_size = inner.block_size
        self.density = density
        self.seed = seed
        self.selecting = Timer(device)
        self.calls = self._kept = self._causal = 0
        self._number = next(_numbers)
        _made[self._number] = self

    @property
    def dense_tokens(self) -> int:
        """As the inner selector's."""
        return self.inner.dense_tokens

    def expected_density(self, tokens: int) -> float:
        """The stated density."""
        return self.density

    def settings(self) -> Tensor:
        """Its number, then the inner selector's: one compiled graph serves them all."""
        return torch.cat((torch.tensor([self._number], dtype=torch.float64, device="cpu"), self.inner.settings()))

    @classmethod
    def operator(cls) -> Any:
        """As `Selector.operator`."""
        return _stand_in

    def forget(self) -> None:
        """Start counting anew."""
        self.calls = self._kept = self._causal = 0
        self.selecting.take_ms()

    def kept_density(self) -> float:
        """Kept blocks / causal blocks of all calls since `forget`."""
        return self._kept / self._causal

    def run(self, query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, *rest: Any) -> Lists:
        """What the operator does.

        The lists are new ones, of the shapes that the inner selector's have: a compiled graph may reuse the memory of
        what an operator returns.
        """
        with self.selecting.once():
            lists = self.inner.operator()(query, key, starts, lengths, *rest)[:3]
        batch, heads, q_len, _ = query.shape
        drawn = _draw(q_len, key.shape[2], heads, self.density, self.block_size, query.device, self.seed)
        self.calls += 1
        self._kept += drawn.kept
        self._causal += drawn.causal
        found = drawn.count.repeat(batch, 1, 1), drawn.full_count.repeat(batch, 1, 1), torch.zeros_like(lists[2])
        _, partial, _, full = both_lists(found)
        partial[..., : drawn.partial.shape[-1]], full[..., : drawn.full.shape[-1]] = drawn.partial, drawn.full
        return found


@dataclass(frozen=True)
class _Drawn:
    """The lists of one shape, cut to the longest row, and the blocks of a head."""

    count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor
    kept: int
    causal: int


@functools.cache
def _draw(
    q_len: int, kv_len: int, heads: int, density: float, block_size: int, device: torch.device, seed: int
) -> _Drawn:
    found = chunk_selection(q_len, kv_len, heads, density, block_size=block_size, device=device, seed=seed)
    count, partial, full_count, full = found.lists
    cut = [
        indices[..., : max(1, int(longest.max()))].contiguous()
        for longest, indices in ((count, partial), (full_count, full))
    ]
    kept = int(found.kept_blocks()[0, 0])
    return _Drawn(count, cut[0], full_count, cut[1], kept, round(kept / found.density()[0, 0].item()))


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
    rest = (settings[1:], scale, block_size, all_partial, zero_tails)
    count, full_count, indices = _made[int(settings[0])].run(query, key, starts, lengths, *rest)
    return count, full_count, indices


@_stand_in.register_fake
def _(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
    return traced_lists(query, key, block_size, 0)
