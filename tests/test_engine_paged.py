"""Sparse attention of a chunk over a paged cache, what it counts, and what is compiled before the first request."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import causal_oracle, relative_error
from paged import PagedBatch

from flexprefill_fa import FlexPrefillConfig, StreamingLLMConfig, select_blocks
from flexprefill_fa.integrations.engine_counts import DensityCounter, DensityLog, causal_blocks, tally
from flexprefill_fa.integrations.engine_paged import GatherBuffer, attend_paged, gather, warm_up, warm_up_lengths
from flexprefill_fa.integrations.engine_settings import Settings
from flexprefill_fa.integrations.vllm_version import CacheLayout
from flexprefill_fa.selection import every_block


@given(
    st.integers(1, 70), st.sampled_from([1, 4, 16]), st.sampled_from([0, 1, None]), st.booleans(), st.integers(0, 2**16)
)
@settings(max_examples=60, deadline=None)
def test_gathering_restores_the_order(kv_len: int, size: int, kv_dim: int | None, other_order: bool, seed: int) -> None:
    batch = PagedBatch([(1, kv_len), (1, 20)], size, kv_heads=2, kv_dim=kv_dim, seed=seed)
    cache = batch.cache
    if other_order:  # in memory heads and rows of a block may change places: some backends ask for that
        first = 1 if kv_dim is None else 2
        cache = cache.transpose(first, first + 1).contiguous().transpose(first, first + 1)
    blocks = batch.common.block_table_tensor[0, : -(-kv_len // size)]
    room = GatherBuffer().room(len(blocks) * size, 2, batch.query)
    for out in room:
        out.fill_(float("nan"))
    halves = CacheLayout(kv_dim).split(cache)
    keys, values = (gather(part, blocks, kv_len, out) for part, out in zip(halves, room, strict=True))
    assert torch.equal(keys[0], batch.keys[0]) and torch.equal(values[0], batch.values[0])
    assert keys.data_ptr() == room[0].data_ptr() and values.data_ptr() == room[1].data_ptr(), "nothing else was taken"
    assert keys.stride()[1:] == (16, 32, 1) and room[0].storage_offset() == room[1].storage_offset() == 0


def test_a_buffer_grows_only_where_it_must() -> None:
    buffer, like = GatherBuffer(), torch.empty(1, 4, 32, dtype=torch.bfloat16)
    first = buffer.room(200, 2, like)
    assert first[0].shape == (256, 2, 32) and first[0].dtype == torch.bfloat16
    assert buffer.room(256, 2, like)[0] is first[0] and buffer.room(3, 2, like)[1] is first[1]
    assert buffer.room(257, 2, like)[0].shape == (384, 2, 32)


@pytest.mark.parametrize("kv_dim", [1, None])
@pytest.mark.parametrize("q_len,kv_len", [(400, 400), (257, 700), (384, 1024)])
@pytest.mark.parametrize(
    "config", [StreamingLLMConfig(sink=64, window=128), FlexPrefillConfig(gamma=0.6, min_budget=128)]
)
def test_a_chunk_equals_the_oracle_over_its_kept_blocks(q_len: int, kv_len: int, config, kv_dim: int | None) -> None:
    batch = PagedBatch([(q_len, kv_len)], heads=4, kv_heads=2, head_dim=32, kv_dim=kv_dim)
    keys, values = CacheLayout(kv_dim).split(batch.cache)
    chosen = Settings(selector=config)
    blocks = batch.common.block_table_tensor[0, : -(-kv_len // 16)]
    scale = 32**-0.5
    out, selection = attend_paged(batch.query, keys, values, blocks, kv_len, chosen, scale, GatherBuffer())
    query, key, value = batch.query.transpose(0, 1)[None], batch.keys[0][None], batch.values[0][None]
    expected, _, real = causal_oracle(query, key, value, selection)
    assert relative_error(out.transpose(0, 1)[None], expected, real) < 1e-5
    assert torch.equal(selection.to_dense(), select_blocks(query, key, config, scale=scale).to_dense())
    assert selection.density().mean() < 0.95
    dense, _, _ = causal_oracle(query, key, value, every_block(query, key, 128))
    assert relative_error(out.transpose(0, 1)[None], dense, real) > 0.05, "dropping blocks changed nothing"


@given(st.integers(1, 400), st.integers(0, 400), st.sampled_from([64, 128]))
@settings(max_examples=60, deadline=None)
def test_causal_blocks(q_len: int, prefix: int, size: int) -> None:
    query, key = torch.empty(1, 1, q_len, 16), torch.empty(1, 1, q_len + prefix, 16)
    assert causal_blocks(q_len, q_len + prefix, size) == int(every_block(query, key, size).kept_blocks())


def test_counting() -> None:
    counter, untouched = DensityCounter(), DensityCounter()
    log = DensityLog([counter, untouched], seconds=10)
    nothing = {"chunks": 0, "queries": 0, "kept_blocks": 0, "causal_blocks": 0, "failures": 0, "declined": 0}
    assert counter.read() == {**nothing, "density": None}
    assert log.poll(0.0) is None
    query, key = torch.randn(2, 1, 2, 512, 16)
    kept = causal = 0
    for config in (StreamingLLMConfig(sink=0, window=128), FlexPrefillConfig(gamma=1.0)):
        selection = select_blocks(query, key, config)
        counter.add(tally(selection))
        kept += int(selection.kept_blocks().sum())
        causal += 2 * 10
    found = counter.read()
    blocks = {"kept_blocks": kept, "causal_blocks": causal}
    assert found == {**nothing, **blocks, "chunks": 2, "queries": 1024, "density": kept / causal}
    assert log.poll(1.0) is None, "the copy has only begun"
    line = log.poll(2.0)
    assert line == f"sparse prefill so far: 2 chunks of 1024 tokens, density {kept / causal:.3f}, 0 failed"
    assert log.poll(3.0) is None and log.poll(10.9) is None
    assert log.poll(11.1) is None and log.poll(11.2) is None, "nothing new"
    counter.add(tally(selection))
    assert log.poll(11.3) is None and log.poll(11.4) is not None
    counter.reset()
    assert counter.read()["density"] is None


def test_no_line_where_none_is_wanted() -> None:
    counter = DensityCounter()
    query, key = torch.randn(2, 1, 2, 512, 16)
    counter.add(tally(select_blocks(query, key, StreamingLLMConfig())))
    log = DensityLog([counter], seconds=0)
    assert log.poll(0.0) is None and log.poll(100.0) is None


def test_what_compiles_before_the_first_request() -> None:
    chosen = Settings(min_prefill_tokens=2048, min_prompt_tokens=8192)
    whole, prefixed = [(8191, 8191), (8192, 8192)], [(8191, 131072), (8192, 131072)]
    assert warm_up_lengths(8192, 131072, chosen) == [whole[1], *prefixed], "8191 keys are too few"
    chosen = Settings(min_prefill_tokens=2048, min_prompt_tokens=4096)
    assert warm_up_lengths(8192, 131072, chosen) == [*whole, *prefixed]
    assert warm_up_lengths(16384, 8200, chosen) == [*whole, (8063, 8192), (8064, 8192)], "behind a cached prefix too"
    assert warm_up_lengths(1024, 131072, chosen) == []
    assert warm_up_lengths(8192, 2048, chosen) == []


def test_warming_up_runs_the_longest_chunk_last() -> None:
    """On zeros of the layers' own memory layout: queries are a part of a wider row."""
    seen = []

    def attend(query, key, value, chosen, scale):
        assert not query.any() and not key.any()
        seen.append((query.shape, query.stride()[2], key.shape, key.data_ptr() != value.data_ptr()))
        return None, None

    rows = torch.randn(600, 6, 32)[:, :4]
    chosen = Settings(min_prefill_tokens=128, min_prompt_tokens=256)
    buffer = GatherBuffer()
    assert warm_up(rows, 2, 1024, 1040, chosen, 1.0, buffer, attend) == len(seen) == 4  # pyright: ignore[reportArgumentType]
    assert buffer.room(1, 2, rows)[0].shape == (1152, 2, 32), "kept for the chunks to come"
    assert seen[-1] == ((1, 4, 512, 32), 192, (1, 2, 1024, 32), True)
