"""Random blocks of a given density: as a selection, and in the place of what a selector chose.

Models with random weights have no attention pattern, so what a selector finds in them says nothing about its cost on
real prompts; what selecting costs, and what attending over a density costs, can be measured all the same. `StandIn`
runs wherever a selector does, inside compiled models too.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.timing import Timer
from flexprefill_fa import BlockSelection
from flexprefill_fa.grid import Grid, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.index_lists import both_lists, shared_lists
from flexprefill_fa.masks.selector import Lists, Selector, traced_lists

_made: weakref.WeakValueDictionary[int, StandIn] = weakref.WeakValueDictionary()
_numbers = itertools.count()


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
    """`round(density x causal blocks)` blocks per head: the diagonal, the first column, others at random.

    The queries are the last `q_len` of `kv_len` keys. Each head draws its own blocks, the same on every device. The
    density is higher where what is always kept is more.
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
    for _ in range(heads):  # one at a time: a long prompt's blocks are many
        keep = always.flatten().clone()
        keep[free[torch.randperm(len(free), generator=generator)[:extra]]] = True
        keep = keep.view(1, 1, *visible.shape).to(device)
        lists.append(shared_lists(keep & ~full, keep & full))
    parts = tuple(torch.cat(tensors, 1) for tensors in zip(*lists, strict=True))
    return BlockSelection(*both_lists(parts), q_len, kv_len, block_size)


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
        shape = q_len, key.shape[2], heads, self.density, self.block_size, query.device, self.seed
        (count, drawn, full_count, drawn_full), kept, causal = _draw(*shape)
        self.calls, self._kept, self._causal = self.calls + 1, self._kept + kept, self._causal + causal
        found = count.repeat(batch, 1, 1), full_count.repeat(batch, 1, 1), torch.zeros_like(lists[2])
        _, partial, _, full = both_lists(found)
        partial[..., : drawn.shape[-1]], full[..., : drawn_full.shape[-1]] = drawn, drawn_full
        return found


@functools.cache
def _draw(
    q_len: int, kv_len: int, heads: int, density: float, block_size: int, device: torch.device, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, int]:
    """The lists of one shape, cut to their longest rows; how many blocks a head keeps, and how many are causal."""
    found = chunk_selection(q_len, kv_len, heads, density, block_size=block_size, device=device, seed=seed)
    count, indices, full_count, full_indices = found.lists
    partial, full = (
        listed[..., : max(1, int(used.max()))].contiguous()
        for used, listed in ((count, indices), (full_count, full_indices))
    )
    causal = int(visible_blocks(found.grid, found.ranges).sum())
    return (count, partial, full_count, full), int(found.kept_blocks()[0, 0]), causal


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
