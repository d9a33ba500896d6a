"""Who attends how in a step: against a plain model of paged attention, over random batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import PagedBatch, paged_attention
from vllm_releases import V24, V33, CommonAttentionMetadata33, Release

from flexprefill_fa.integrations.engine_plan import split_requests, take
from flexprefill_fa.integrations.engine_settings import Settings
from flexprefill_fa.integrations.vllm_plan import (
    backend_problem,
    layer_problem,
    restrict,
    sparse_step,
    split_step,
    step_problem,
)

SETTINGS = Settings(min_prefill_tokens=8, min_prompt_tokens=24)


@st.composite
def batches(draw: st.DrawFn) -> PagedBatch:
    """Decode tokens, short and long chunks, with and without a cached prefix, in any order."""
    queries = st.sampled_from([1, 1, 2, 7, 8, 9, 23, 24, 40])
    requests = draw(st.lists(st.tuples(queries, st.integers(0, 50)), min_size=1, max_size=6))
    batch = PagedBatch(
        [(q_len, q_len + prefix) for q_len, prefix in requests],
        block_size=draw(st.sampled_from([1, 4, 16])),
        kv_dim=draw(st.sampled_from([0, 1, None])),
        padding=draw(st.sampled_from([0, 5])),
        seed=draw(st.integers(0, 2**16)),
    )
    batch.common = draw(st.sampled_from([V24, V33])).common(batch.common)
    return batch


@given(batches())
@settings(max_examples=60, deadline=None)
def test_every_row_is_attended_once(batch: PagedBatch) -> None:
    split = split_requests(
        batch.common.query_start_loc_cpu.tolist(), [kv_len for _, kv_len in batch.requests], SETTINGS
    )
    owners = sorted([chunk.request for chunk in split.chunks] + list(split.rest))
    assert owners == list(range(len(batch.requests)))
    for chunk in split.chunks:
        assert (chunk.q_len, chunk.kv_len) == batch.requests[chunk.request]
        assert slice(chunk.start, chunk.end) == batch.rows_of(chunk.request)
    long = {i for i, (q_len, kv_len) in enumerate(batch.requests) if q_len >= 8 and kv_len >= 24}
    assert {chunk.request for chunk in split.chunks} == long


@given(batches(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_part_of_a_step_is_a_step(batch: PagedBatch, data: st.DataObject) -> None:
    """Dense attention by the restricted metadata alone gives the rows that the whole step has for those requests."""
    everyone = range(len(batch.requests))
    kept = sorted(data.draw(st.sets(st.sampled_from(list(everyone)), min_size=1)))
    before = dataclasses.replace(batch.common)
    part, rows = restrict(batch.common, kept)
    query = take(batch.query, rows)
    got = paged_attention(query, batch.cache, part, batch.block_size, batch.kv_dim)
    expected = torch.cat([batch.dense()[batch.rows_of(request)] for request in kept])
    assert torch.allclose(got, expected, atol=1e-6)
    assert part.num_reqs == len(kept) and part.num_actual_tokens == len(expected) == len(query)
    assert part.max_query_len == max(batch.requests[request][0] for request in kept)
    assert part.max_seq_len == max(batch.requests[request][1] for request in kept)
    assert torch.equal(part.query_start_loc, part.query_start_loc_cpu)
    for name in ("slot_mapping", "positions"):
        whole = getattr(batch.common, name)
        assert torch.equal(getattr(part, name), torch.cat([whole[batch.rows_of(request)] for request in kept]))
    assert torch.equal(part.seq_lens, batch.common.seq_lens[kept])
    assert torch.equal(part.seq_lens_cpu_upper_bound, batch.common.seq_lens[kept])
    if hasattr(part, "req_idx"):
        assert part.req_idx.tolist() == [40 + request for request in kept]
        assert part._token_to_req_indices_cache is None and part._num_computed_tokens_cache is None
    assert part.is_prefilling.tolist() == [batch.requests[request][0] > 1 for request in kept]
    for field in dataclasses.fields(before):  # the step itself is left alone
        assert getattr(batch.common, field.name) is getattr(before, field.name)


def test_requests_that_stand_together_are_views() -> None:
    batch = PagedBatch([(1, 30), (1, 9), (40, 60), (3, 5)])
    part, rows = restrict(batch.common, (0, 1))
    assert rows == slice(0, 2)
    assert part.block_table_tensor.data_ptr() == batch.common.block_table_tensor.data_ptr()
    assert part.slot_mapping.data_ptr() == batch.common.slot_mapping.data_ptr()
    _, apart = restrict(batch.common, (0, 1, 3))
    assert isinstance(apart, torch.Tensor) and apart.tolist() == [0, 1, 42, 43, 44]


def test_requests_without_queries_are_nobodys() -> None:
    split = split_requests([0, 1, 1, 40], [30, 7, 39], SETTINGS)
    assert split.rest == (0,) and [chunk.request for chunk in split.chunks] == [2]


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        ({}, True),
        ({"causal": False}, False),
        ({"causal": torch.tensor([True])}, False),
        ({"seq_lens_cpu_upper_bound": None}, False),
        ({"dcp_local_seq_lens": torch.tensor([1])}, False),
        ({"encoder_seq_lens": torch.tensor([1])}, False),
        ({"mm_req_doc_ranges": {}}, False),
        ({"logits_indices_padded": torch.tensor([1])}, False),
    ],
)
@pytest.mark.parametrize("release", [V24, V33], ids=lambda release: release.version)
def test_steps_that_cannot_be_split_are_the_parents(change: dict, sparse: bool, release: Release) -> None:
    common = dataclasses.replace(release.common(PagedBatch([(1, 30), (40, 60)]).common), **change)
    assert (split_step(common, SETTINGS) is not None) == sparse
    assert (step_problem(common) is None) == sparse


@dataclasses.dataclass
class LaterMetadata(CommonAttentionMetadata33):
    groups: torch.Tensor | None = None
    tiles: int = 4


def test_fields_that_are_not_known_keep_a_step_whole_where_they_are_set() -> None:
    common = LaterMetadata.like(PagedBatch([(1, 30), (40, 60)]).common)
    assert split_step(common, SETTINGS) is not None
    for change in ({"groups": torch.tensor([0, 1])}, {"tiles": 8}):
        changed = dataclasses.replace(common, **change)
        assert split_step(changed, SETTINGS) is None
        assert step_problem(changed) == f"the field {next(iter(change))}"


def test_a_step_without_long_chunks_is_the_parents() -> None:
    assert split_step(PagedBatch([(1, 30), (7, 60), (8, 23)]).common, SETTINGS) is None


def test_padded_requests_are_ignored() -> None:
    """Rows of the metadata behind `num_reqs` belong to nobody."""
    common = PagedBatch([(40, 60), (40, 60)]).common
    common.num_reqs = 1
    split = split_step(common, SETTINGS)
    assert split is not None and len(split.chunks) == 1 and not split.rest


@given(batches())
@settings(max_examples=40, deadline=None)
def test_the_metadata_of_a_step(batch: PagedBatch) -> None:
    split = split_step(batch.common, SETTINGS)
    if split is None:
        return
    built = []
    step = sparse_step(batch.common, split, batch.block_size, lambda part: built.append(part) or "rest", lambda: "all")
    for chunk, blocks in zip(step.chunks, step.blocks, strict=True):
        used = -(-chunk.kv_len // batch.block_size)
        assert torch.equal(blocks, batch.common.block_table_tensor[chunk.request, :used])
    assert step.rest == ("rest" if split.rest else None)
    assert len(built) == bool(split.rest)
    assert step.dense == "all" and step.num_actual_tokens == batch.common.num_actual_tokens


ASKED = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None, "use_kv_connector": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"kv_cache_dtype": "bfloat16"}, None),
        ({"kv_cache_dtype": "float16"}, "a KV cache of float16"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache of fp8"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "a KV cache of int8_per_token_head"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"use_sparse": True}, "multi-head latent attention"),
        ({"attn_type": "encoder_only"}, "attention that is not causal"),
        ({"use_mm_prefix": True}, "attention that is not causal"),
        ({"use_non_causal": True}, "attention that is not causal"),
        ({"use_rswa": True}, "reference sliding-window attention"),
        ({"use_adaptive_verification": True}, "adaptive verification, whose query lengths only the GPU knows,"),
        ({"has_sliding_window": True, "use_kv_connector": True, "use_dcp": True, "block_size": 16}, None),
        ({"use_tides": True}, "the unknown criterion use_tides"),
        ({"use_tides": False}, None),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"head_size": 512}, "a head dim of 512, outside 16 to 256"),
    ],
)
def test_kinds_of_layers_that_the_parent_serves(change: dict, reason: str | None) -> None:
    assert backend_problem(**{**ASKED, **change}) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 4096}, "a sliding window"),
        ({"logits_soft_cap": 50.0}, "capped scores"),
        ({"logits_soft_cap": 0.0}, None),
        ({"extra": {"sinks": None, "use_alibi_sqrt": False, "chunk_lookback": -1}}, None),
        ({"extra": {"chunk_lookback": 2}}, "its argument chunk_lookback"),
        ({"extra": {"rotate": True}}, "its argument rotate"),
    ],
)
def test_layers_that_the_parent_serves(change: dict, reason: str | None) -> None:
    layer = {"alibi_slopes": None, "sliding_window": None, "logits_soft_cap": None, "extra": {}}
    assert layer_problem(**{**layer, **change}) == reason
