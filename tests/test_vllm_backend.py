"""The classes that vLLM loads, over stand-ins for vLLM: who is called with what, and what comes out."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from oracle import causal_oracle, relative_error
from paged import MIXED, SMALL, PagedBatch
from vllm_layers import batch_of, one_layer, run
from vllm_stubs import (
    CGSupport,
    FakeVllm,
    ParentBuilder,
    ParentImpl,
    ParentMetadata,
    engine_config,
    log_lines,
)

from flexprefill_fa.integrations.vllm_plan import SparseStep
from flexprefill_fa.integrations.vllm_version import CacheLayout
from flexprefill_fa.selection import BlockSelection


def kept_of(batch: PagedBatch, request: int, attended: list[BlockSelection]) -> torch.Tensor:
    """The fp64 oracle `[q, Hq, D]` of a sparse request, over the blocks that were selected for it."""
    rows = batch.rows_of(request)
    query = batch.query[rows].transpose(0, 1)[None]
    out, _, _ = causal_oracle(query, batch.keys[request][None], batch.values[request][None], attended.pop(0))
    return out[0].transpose(0, 1)


def watch(layer: Any) -> list[BlockSelection]:
    """Every selection that the layer attends over."""
    found, attend = [], layer.impl.attend

    def attend_and_keep(*arguments: Any) -> Any:
        out, selection = attend(*arguments)
        found.append(selection)
        return out, selection

    layer.impl.attend = attend_and_keep
    return found


@pytest.mark.parametrize("requests", [MIXED, [(1, 90), (2, 5), (260, 700)], [(260, 700)], [(300, 300), (1, 9)]])
@pytest.mark.parametrize("padding", [0, 7])
def test_a_mixed_step(vllm: FakeVllm, requests: list[tuple[int, int]], padding: int) -> None:
    layer, builder = one_layer(vllm)
    batch = batch_of(requests, padding=padding)
    metadata = builder.build(0, batch.common)
    assert isinstance(metadata, SparseStep)
    attended = watch(layer)
    out = run(layer, metadata, batch)
    sparse = [chunk.request for chunk in metadata.chunks]
    rest = [request for request in range(len(requests)) if request not in sparse]
    assert sparse == [request for request, pair in enumerate(requests) if pair in [(260, 700), (300, 300)]]
    assert len(layer.impl.calls) == bool(rest), "the parent is called once, or not at all"
    if rest:
        part = layer.impl.calls[0][0].common
        assert part.num_reqs == len(rest) and part.num_actual_tokens == sum(requests[request][0] for request in rest)
    dense = batch.dense()
    for request in rest:
        rows = batch.rows_of(request)
        assert torch.allclose(out[rows].double(), dense[rows], atol=1e-5)
    for request in sparse:
        rows = batch.rows_of(request)
        expected = kept_of(batch, request, attended)
        everything = torch.ones(())
        assert relative_error(out[rows], expected, everything) < 1e-5
        assert relative_error(out[rows], dense[rows], everything) > 0.05, "sparse attention turned dense"
    assert out[batch.common.num_actual_tokens :].isnan().all(), "padding is nobody's"
    counted = layer.impl.sparse_counter.read()
    assert counted["chunks"] == len(sparse) and 0 < counted["density"] < 0.95 and counted["failures"] == 0


def test_without_a_long_chunk_the_parent_sees_what_it_always_sees(vllm: FakeVllm) -> None:
    layer, builder = one_layer(vllm)
    batch = batch_of([(1, 400), (127, 500), (200, 255)])
    metadata = builder.build(0, batch.common)
    assert isinstance(metadata, ParentMetadata) and metadata.common is batch.common and metadata.builder is builder
    out = run(layer, metadata, batch)
    assert torch.allclose(out.double(), batch.dense(), atol=1e-5)
    assert layer.impl.calls == [(metadata, batch.query)] and layer.impl.sparse_counter.read()["chunks"] == 0


def test_shared_prefixes_drafts_and_captured_graphs_are_the_parents(vllm: FakeVllm) -> None:
    _, builder = one_layer(vllm)
    long = batch_of([(300, 300)]).common
    assert isinstance(builder.build(0, long), SparseStep)
    assert builder.build(16, long).common_prefix_len == 16
    assert builder.build(0, long, fast_build=True).fast_build
    decode = batch_of([(1, 300), (1, 7)]).common
    assert builder.build_for_cudagraph_capture(decode).common is decode
    assert builder.use_cascade_attention(common_prefix_len=32, query_lens=np.array([1, 100]), num_sms=1)
    assert not builder.use_cascade_attention(common_prefix_len=32, query_lens=np.array([1, 128]), num_sms=1)
    assert not builder.supports_update_block_table


@pytest.mark.parametrize("inherited", list(CGSupport))
def test_only_single_token_decode_is_captured_in_full(vllm: FakeVllm, inherited: CGSupport) -> None:
    class OtherBuilder(ParentBuilder):
        _cudagraph_support = inherited

    class OtherBackend(vllm.parent):
        get_builder_cls = staticmethod(lambda: OtherBuilder)

    layout = CacheLayout(vllm.release.kv_dim)
    found = vllm.module.backend_for(OtherBackend, layout).get_builder_cls().get_cudagraph_support(None, None)
    assert found.value == min(inherited.value, CGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"sliding_window": 64}, "a sliding window"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "capped scores"),
    ],
)
def test_a_dense_layer_beside_sparse_ones(vllm: FakeVllm, caplog, extra: dict, words: str) -> None:
    """Both in one group: the dense one gets the parent's metadata for the whole step, from a builder of its own."""
    caplog.set_level(logging.INFO)
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    sparse = vllm.layer(backend, config, "layer.0")
    dense = vllm.layer(backend, config, "layer.1", **extra)
    builder = vllm.builder(backend, config, ["layer.0", "layer.1"])
    assert f"sparse prefill: layers with {words} are served by the parent backend alone" in log_lines(caplog)
    batch = batch_of(MIXED)
    metadata = builder.build(0, batch.common)
    run(sparse, metadata, batch)
    out = run(dense, metadata, batch)
    assert torch.allclose(out.double(), batch.dense(), atol=1e-5)
    (call,) = dense.impl.calls
    assert call[0].common is batch.common and call[0].builder is not builder
    assert metadata.rest.builder is builder
    assert dense.impl.sparse_counter is None and dense.impl.fused_output_quant_supported("fp8")
    assert not sparse.impl.fused_output_quant_supported("fp8")


def test_profiling_warms_up_once_for_layers_of_one_shape(vllm: FakeVllm, monkeypatch) -> None:
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    layers = [vllm.layer(backend, config, f"layer.{index}") for index in range(3)]
    warmed = []
    monkeypatch.setattr(vllm.of("vllm_impl"), "warm_up", lambda *arguments: warmed.append(arguments) or 4)
    batch = batch_of([(300, 300)])
    for _ in range(2):
        for layer in layers:
            assert not run(layer, None, batch).any()
    assert len(warmed) == 1 and warmed[0][1:4] == (2, 4096, 4096)
    assert warmed[0][6] is layers[0].impl.gather_buffer


def test_the_buffer_is_taken_once_while_profiling_and_goes_with_the_engine(vllm: FakeVllm) -> None:
    """Whole pages of the longest prompt, for all layers of one shape; no chunk takes more."""
    config = engine_config(**SMALL)
    config.model_config.max_model_len = 1010
    config.cache_config.block_size = 48
    backend = vllm.choose(config)
    layers = [vllm.layer(backend, config, f"layer.{index}") for index in range(3)]
    buffers = {id(layer.impl.gather_buffer) for layer in layers}
    assert len(buffers) == 1
    profiled = batch_of([(300, 300)])
    for layer in layers:
        run(layer, None, profiled)
    layer = layers[0]
    assert layer.impl.sparse_counter.read()["chunks"] == 0
    before = layer.impl.gather_buffer.room(1056, 2, profiled.query)
    assert before[0].shape == (1152, 2, 32) and not before[0].any(), "22 pages of 48, in multiples of 128"
    builder = vllm.builder(backend, config, ["layer.0", "layer.1", "layer.2"], vllm.spec(48))
    for kv_len in (300, 640, 1010):
        batch = batch_of([(260, kv_len)], block_size=48)
        metadata = builder.build(0, batch.common)
        for layer in layers:
            run(layer, metadata, batch)
    assert layer.impl.sparse_counter.read()["chunks"] == 3
    after = layer.impl.gather_buffer.room(1, 2, profiled.query)
    assert all(one is other for one, other in zip(before, after, strict=True))
    other = engine_config(**SMALL)
    assert id(vllm.layer(backend, other, "layer.0").impl.gather_buffer) not in buffers
    gone = weakref.ref(before[0])
    del before, after, layers, layer, builder, metadata, config, backend
    vllm.config = None
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name,whole", [("FLASH_ATTN", True), ("PARENT", False)])
def test_keys_that_the_parent_does_not_read_are_not_copied(vllm: FakeVllm, monkeypatch, name: str, whole: bool) -> None:
    layer, builder = one_layer(vllm)
    layer.impl.parent_name = name
    seen, forward = [], ParentImpl.forward
    batch = batch_of(MIXED)
    key = torch.empty(len(batch.query), batch.kv_heads, batch.head_dim)

    def watched(self: Any, owner: Any, query: Any, key: Any, *arguments: Any) -> Any:
        seen.append(key)
        return forward(self, owner, query, key, *arguments)

    monkeypatch.setattr(ParentImpl, "forward", watched)
    layer.impl.forward(layer, batch.query, key, key, batch.cache, builder.build(0, batch.common), batch.query * 0)
    assert (seen[0] is key) == whole
