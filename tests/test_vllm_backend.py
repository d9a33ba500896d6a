"""The classes that vLLM loads, over stand-ins for vLLM: who is called with what, and what comes out."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle import causal_oracle, relative_error
from paged import PagedBatch
from vllm_stubs import (
    CGSupport,
    FakeVllm,
    FullAttentionSpec,
    ParentBackend,
    ParentBuilder,
    ParentImpl,
    ParentMetadata,
    SlidingWindowSpec,
    engine_config,
    fake_vllm,
    log_lines,
)

from flexprefill_fa.integrations.vllm import register, statistics
from flexprefill_fa.integrations.vllm_plan import SparseStep
from flexprefill_fa.selection import BlockSelection

SMALL: dict[str, Any] = {
    "selector": "streaming_llm",
    "sink": 0,
    "window": 128,
    "min_prefill_tokens": 128,
    "min_prompt_tokens": 256,
    "log_seconds": 0,
}
MIXED = [(1, 90), (260, 700), (1, 17), (300, 300), (40, 300), (200, 210)]  # rows 1 and 3 are long


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with fake_vllm() as fake:
        yield fake


def one_layer(vllm: FakeVllm, **settings: Any) -> tuple[Any, Any]:
    config = engine_config(**{**SMALL, **settings})
    backend = vllm.choose(config)
    return vllm.layer(backend, config, "layer.0"), vllm.builder(backend, config, ["layer.0"])


def run(layer: Any, metadata: Any, batch: PagedBatch) -> torch.Tensor:
    """`forward` as vLLM calls it, into an output of NaN."""
    output = torch.full_like(batch.query, float("nan"))
    key = torch.empty(len(batch.query), batch.kv_heads, batch.head_dim)
    assert layer.impl.forward(layer, batch.query, key, key, batch.cache, metadata, output=output) is output
    return output


def batch_of(requests: list[tuple[int, int]], **options: Any) -> PagedBatch:
    return PagedBatch(requests, heads=4, kv_heads=2, head_dim=32, **options)


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

    class OtherBackend(ParentBackend):
        get_builder_cls = staticmethod(lambda: OtherBuilder)

    found = vllm.module.backend_for(OtherBackend).get_builder_cls().get_cudagraph_support(None, None)
    assert found.value == min(inherited.value, CGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value)


def test_the_class_for_a_layer(vllm: FakeVllm) -> None:
    backend = vllm.choose(engine_config(**SMALL))
    assert issubclass(backend, ParentBackend) and backend.get_name() == "CUSTOM"
    assert issubclass(backend.get_impl_cls(), ParentImpl) and issubclass(backend.get_builder_cls(), ParentBuilder)
    assert getattr(vllm.module, backend.full_cls_name()[1]) is backend
    assert vllm.asked[-1].head_size == 32 and vllm.asked[-1].dtype == torch.bfloat16
    assert vllm.choose(engine_config()) is backend


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, "a KV cache of fp8"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"attn_type": "encoder_only"}, "attention that is not causal"),
    ],
)
def test_layers_that_cannot_run_sparse_get_the_parent_itself(vllm: FakeVllm, caplog, asked: dict, words: str) -> None:
    caplog.set_level(logging.INFO)
    config = engine_config(**SMALL)
    for _ in range(3):
        assert vllm.choose(config, **asked) is ParentBackend
    assert log_lines(caplog) == [f"sparse prefill: layers with {words} are served by PARENT alone"], "said once"
    assert vllm.choose(config) is not ParentBackend


def test_parents_whose_cache_cannot_be_read(vllm: FakeVllm, monkeypatch) -> None:
    monkeypatch.setattr(ParentBackend, "forward_includes_kv_cache_update", True)
    assert vllm.choose(engine_config(**SMALL)) is ParentBackend
    monkeypatch.undo()
    monkeypatch.setattr(ParentBackend, "get_kv_cache_shape", staticmethod(lambda *shape: shape[:3]))
    assert vllm.choose(engine_config(**SMALL)) is ParentBackend


def test_bad_engines_are_refused_before_they_start(vllm: FakeVllm, monkeypatch) -> None:
    with pytest.raises(ValueError, match="unknown setting 'gama'"):
        vllm.choose(engine_config(gama=0.9))
    monkeypatch.setattr(vllm.module, "vllm_version", "0.25.1")
    with pytest.raises(ValueError, match=r"is for vLLM 0\.24, got vLLM 0\.25\.1"):
        vllm.choose(engine_config(**SMALL))
    monkeypatch.undo()
    vllm.cuda = False
    with pytest.raises(ValueError, match="is for CUDA GPUs, got"):
        vllm.choose(engine_config(**SMALL))


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


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        (SlidingWindowSpec(16), {}),
        (FullAttentionSpec(16, attention_chunk_size=64), {}),
        (None, {"parallel_config.decode_context_parallel_size": 2}),
        (None, {"parallel_config.use_ubatching": True}),
        (None, {"cache_config.kv_sharing_fast_prefill": True}),
    ],
)
def test_groups_that_cannot_run_sparse(vllm: FakeVllm, caplog, spec: Any, change: dict[str, Any]) -> None:
    caplog.set_level(logging.INFO)
    config = engine_config(**SMALL)
    for path, value in change.items():
        part, _, name = path.partition(".")
        setattr(getattr(config, part), name, value)
    backend = vllm.choose(config)
    vllm.layer(backend, config, "layer.0")
    builder = vllm.builder(backend, config, ["layer.0"], spec)
    assert isinstance(builder.build(0, batch_of([(300, 300)]).common), ParentMetadata)
    assert any("PARENT serves these layers alone" in line for line in log_lines(caplog))


def test_the_log_at_engine_start(vllm: FakeVllm, caplog) -> None:
    caplog.set_level(logging.INFO)
    one_layer(vllm)
    (line,) = log_lines(caplog)
    assert "1 of 1 layers run long prefill chunks sparse, PARENT the rest: streaming_llm (sink 0, window 128" in line
    caplog.clear()
    one_layer(vllm, min_prefill_tokens=2048)
    assert (
        "nothing will run sparse: chunks have at most 1024 queries (min_prefill_tokens is 2048)" in log_lines(caplog)[1]
    )


def test_a_failure_costs_no_request(vllm: FakeVllm, caplog) -> None:
    """Whatever goes wrong in sparse attention, the parent serves the step, and it is said and counted."""
    layer, builder = one_layer(vllm)
    calls = []

    def fails_late(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return torch.full_like(arguments[0], float("nan")), None

    layer.impl.attend = fails_late
    layer.impl.sparse_counter.add = lambda selection: None
    batch = batch_of(MIXED)
    out = run(layer, builder.build(0, batch.common), batch)
    assert torch.allclose(out.double(), batch.dense(), atol=1e-5)
    (call,) = layer.impl.calls
    assert call[0].common is batch.common
    assert layer.impl.sparse_counter.read()["failures"] == 2
    assert "sparse prefill failed for chunks of (queries, keys) [(260, 700), (300, 300)]" in log_lines(caplog)[-1]


def test_profiling_warms_up_once_for_layers_of_one_shape(vllm: FakeVllm, monkeypatch) -> None:
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    layers = [vllm.layer(backend, config, f"layer.{index}") for index in range(3)]
    warmed = []
    monkeypatch.setattr(vllm.module, "warm_up", lambda *arguments: warmed.append(arguments) or 4)
    batch = batch_of([(300, 300)])
    for _ in range(2):
        for layer in layers:
            assert not run(layer, None, batch).any()
    assert len(warmed) == 1 and warmed[0][1:3] == (2, 4096)


def test_statistics(vllm: FakeVllm) -> None:
    layer, builder = one_layer(vllm)
    batch = batch_of([(300, 300)])
    run(layer, builder.build(0, batch.common), batch)
    context = {"layer.0": layer, "mamba": object()}
    worker = types.SimpleNamespace(vllm_config=engine_config())
    worker.vllm_config.compilation_config.static_forward_context = context
    found = statistics(worker, reset=True)
    assert found["layer.0"]["chunks"] == 1 and found["layer.0"]["queries"] == 300
    assert statistics(worker)["layer.0"]["chunks"] == 0


def test_registering(vllm: FakeVllm, caplog) -> None:
    register()
    register()  # vLLM may load plug-ins more than once
    path = vllm.registered["CUSTOM"]
    assert path == f"{vllm.module.__name__}.SparsePrefillBackend"
    vllm.registered["CUSTOM"] = "somebody.Else"
    register()
    assert vllm.registered["CUSTOM"] == "somebody.Else"
    assert "the attention backend CUSTOM is taken by somebody.Else" in log_lines(caplog)[-1]
