"""Invariants of every selection, whatever the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import BlockSelection, FlexPrefillConfig, select_blocks
from flexprefill_fa.block_mask import check_layout

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """One call of a selector; starts and lengths always explicit."""

    query: Tensor
    key: Tensor
    config: FlexPrefillConfig
    starts: list[int]
    lengths: list[int]

    def select(self, *, all_partial: bool = False) -> BlockSelection:
        return select_blocks(
            self.query,
            self.key,
            self.config,
            starts=self.starts,
            lengths=self.lengths,
            all_partial=all_partial,
        )

    def visible_pairs(self) -> Tensor:
        """bool `[B, Lq, Lkv]`: a real key, at or before the query's position."""
        q_len, kv_len = self.query.shape[2], self.key.shape[2]
        position = torch.arange(kv_len)
        start = torch.tensor(self.starts)[:, None]
        real = (position >= start) & (position < start + torch.tensor(self.lengths)[:, None])
        return real[:, None] & (position <= position[kv_len - q_len :, None])

    def real_queries(self) -> Tensor:
        """bool `[B, Lq]`."""
        position = torch.arange(self.key.shape[2])[self.key.shape[2] - self.query.shape[2] :]
        start = torch.tensor(self.starts)[:, None]
        return (position >= start) & (position < start + torch.tensor(self.lengths)[:, None])

    def by_block(self, pairs: Tensor, padding: bool) -> Tensor:
        """`[B, nq, B, nk, B]` of pairs `[B, Lq, Lkv]`, filled up to whole blocks with `padding`."""
        size = self.config.block_size
        fill = (0, -pairs.shape[2] % size, 0, -pairs.shape[1] % size)
        return torch.nn.functional.pad(pairs, fill, value=padding).unflatten(2, (-1, size)).unflatten(1, (-1, size))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from((64, 128)))
    kv_len = draw(st.one_of(st.integers(7 * block_size, 14 * block_size), st.integers(1, 14 * block_size)))
    q_len = draw(st.one_of(st.just(kv_len), st.integers(kv_len // 2 + 1, kv_len), st.integers(1, kv_len)))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    starts, lengths = [], []
    for _ in range(batch):
        start = draw(st.one_of(st.just(0), st.integers(0, min(kv_len - 1, 300)), st.integers(0, kv_len - 1)))
        real = kv_len - start
        starts.append(start)
        lengths.append(draw(st.one_of(st.just(real), st.integers(max(1, real - 300), real), st.integers(1, real))))
    min_budget = draw(st.one_of(st.just(1), st.integers(1, 5 * block_size)))
    max_budget = draw(st.one_of(st.none(), st.integers(max(min_budget, 3 * block_size), 12 * block_size)))
    config = FlexPrefillConfig(
        gamma=draw(st.sampled_from((0.5, 0.05, 0.9, 0.95, 1.0))),
        tau=draw(st.sampled_from((0.0, 0.2, 1.0))),
        min_budget=min_budget,
        max_budget=max_budget,
        block_size=block_size,
        variant=draw(st.sampled_from(("published", "paper"))),
    )
    seed = draw(st.integers(0, 1000))
    query, key = structured_qk(batch, kv_heads * groups, kv_heads, q_len, kv_len, 16, seed=seed)
    return Case(query, key, config, starts, lengths)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_lists_are_well_formed(case: Case) -> None:
    selection = case.select()
    size, heads = case.config.block_size, case.query.shape[1]
    rows, columns = -(-case.query.shape[2] // size), -(-case.key.shape[2] // size)
    shape = (len(case.starts), heads, rows)
    lists = [(selection.kv_num_blocks, selection.kv_indices), (selection.full_kv_num_blocks, selection.full_kv_indices)]
    check_layout(selection)
    rebuilt = []
    for count, indices in lists:
        assert count.shape == shape and indices.shape == (*shape, columns)
        assert count.dtype == indices.dtype == torch.int32
        assert (count >= 0).all() and (count <= columns).all()
        dense = torch.zeros(*shape, columns, dtype=torch.bool)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, 3).tolist():
            kept = indices[b, h, i, : count[b, h, i]].tolist()
            assert kept == sorted(set(kept)) and all(0 <= j < columns for j in kept)
            dense[b, h, i, kept] = True
        rebuilt.append(dense)
    partial, full = rebuilt
    assert not (partial & full).any()
    assert torch.equal(selection.to_dense(), partial | full)
    assert torch.equal(selection.kept_blocks(), (partial | full).sum((-2, -1)))

    visible = case.by_block(case.visible_pairs(), True)
    assert torch.equal(full, (partial | full) & whole_blocks(case)[:, None]), "the full list: what needs no mask"
    assert visible.all(4).all(2)[:, None].expand_as(full)[full].all()

    everything = case.select(all_partial=True)
    assert torch.equal(everything.to_dense(), selection.to_dense())
    assert (everything.full_kv_num_blocks == 0).all()


def whole_blocks(case: Case) -> Tensor:
    """bool `[B, nq, nk]`: blocks of keys that are all real and visible to every query of the row."""
    size = case.config.block_size
    fits = torch.arange(-(-case.key.shape[2] // size)) * size + size <= case.key.shape[2]
    return case.by_block(case.visible_pairs(), True).all(4).all(2) & fits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_kept_blocks_obey_the_rules(case: Case) -> None:
    selection = case.select()
    keep = selection.to_dense()
    size, config = case.config.block_size, case.config
    real = case.real_queries()
    pairs = case.visible_pairs() & real[:, :, None]
    visible = case.by_block(pairs, False).any(4).any(2)  # [B, nq, nk], blocks of a causal, padded dense attention
    assert not (keep & ~visible[:, None]).any(), "causal, and nothing of padding"

    real_row = case.by_block(real[:, :, None], False).flatten(2).any(-1)  # [B, nq]
    assert not keep.transpose(1, 2)[~real_row].any(), "a row without a real query keeps nothing"
    offset = case.key.shape[2] - case.query.shape[2]
    for b, i in real_row.nonzero().tolist():
        queries = offset + i * size + real[b, i * size : (i + 1) * size].nonzero().flatten()
        kept = keep[b, :, i]
        assert kept[:, case.starts[b] // size].all(), "the first block with a real key"
        assert kept[:, queries // size].all(), "the diagonal"
        if config.variant == "paper" and case.lengths[b] > config.dense_tokens and real[b].sum() > 1:
            count, blocks = kept.sum(-1), int(visible[b, i].sum())
            assert (count >= min(-(-config.min_budget // size), blocks)).all()
            if config.max_budget is not None:
                assert (count <= config.max_budget // size).all()

    some = real_row.any(-1)
    density = selection.density()
    assert ((density > 0) & (density <= 1))[some].all() and (density[~some] == 0).all()
    torch.testing.assert_close(density[some], keep.sum((-2, -1))[some] / visible.sum((-2, -1))[some, None])
    if config.gamma == 1 and config.max_budget is None:
        assert (density[some] == 1).all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases())
def test_repeatable_and_blind_to_padding(case: Case) -> None:
    """The same inputs give the same bits, whatever stands in padded positions."""
    first = case.select()
    offset = case.key.shape[2] - case.query.shape[2]
    real = torch.zeros(len(case.starts), case.key.shape[2], dtype=torch.bool)
    for b, (start, length) in enumerate(zip(case.starts, case.lengths, strict=True)):
        real[b, start : start + length] = True
    case.key.transpose(1, 2)[~real] = float("nan")
    case.query.transpose(1, 2)[~real[:, offset:]] = float("inf")
    second = case.select()
    assert torch.equal(first.to_dense(), second.to_dense())
    torch.testing.assert_close(first.js_distance, second.js_distance, rtol=0, atol=0, equal_nan=True)
