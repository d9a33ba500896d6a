"""What the vLLM backend does when sparse attention fails, over stand-ins for vLLM; and what it counts and logs."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
import torch
from paged import MIXED, SMALL
from vllm_layers import batch_of, one_layer, run
from vllm_stubs import (
    FakeVllm,
    ParentBuilder,
    ParentMetadata,
    engine_config,
    log_lines,
)

from flexprefill_fa.integrations.vllm import statistics
from flexprefill_fa.integrations.vllm_plan import SparseStep


def statistics_of(layer: Any) -> dict[str, Any]:
    config = engine_config()
    config.compilation_config.static_forward_context["layer.0"] = layer
    return statistics(types.SimpleNamespace(vllm_config=config))["layer.0"]


def test_a_failure_costs_no_request(vllm: FakeVllm, caplog) -> None:
    """Whatever goes wrong in sparse attention, the parent serves the step, and it is said and counted."""
    layer, builder = one_layer(vllm)
    calls, attend = [], layer.impl.attend

    def fails_late(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return attend(*arguments)

    layer.impl.attend = fails_late
    batch = batch_of(MIXED)
    out = run(layer, builder.build(0, batch.common), batch)
    assert torch.allclose(out.double(), batch.dense(), atol=1e-5)
    (call,) = layer.impl.calls
    assert call[0].common is batch.common
    counted = layer.impl.sparse_counter.read()
    assert (counted["failures"], counted["chunks"], counted["density"]) == (2, 0, None), "each chunk is counted once"
    assert "sparse prefill failed for chunks of (queries, keys) [(260, 700), (300, 300)]" in log_lines(caplog)[-1]


def test_lasting_failures_switch_sparse_attention_off(vllm: FakeVllm, caplog, monkeypatch) -> None:
    """After three steps in a row; the metadata that a failure needs was prepared before."""
    layer, builder = one_layer(vllm)
    tried, attend = [], layer.impl.attend
    monkeypatch.setattr(ParentBuilder, "__init__", lambda *arguments: pytest.fail("no builder is made while serving"))

    def fails(*arguments: Any) -> Any:
        tried.append(arguments)
        raise RuntimeError("broken")

    batch = batch_of([(300, 300)])
    for good in (False, False, True, False, False, False):
        layer.impl.attend = attend if good else fails
        run(layer, builder.build(0, batch.common), batch)
    assert layer.impl.sparse_off and len(tried) == 5
    late = builder.build(0, batch.common)
    assert isinstance(late, ParentMetadata) and late.builder is builder
    assert torch.allclose(run(layer, late, batch).double(), batch.dense(), atol=1e-5)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 6 and "is off until the engine ends: 3 steps failed in a row" in errors[-1]
    assert len(tried) == 5 and statistics_of(layer)["off"]


def test_one_broken_layer_leaves_the_others_sparse(vllm: FakeVllm) -> None:
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    broken, sound = (vllm.layer(backend, config, f"layer.{index}") for index in range(2))
    builder = vllm.builder(backend, config, ["layer.0", "layer.1"])
    broken.impl.attend = lambda *arguments: pytest.fail("never")
    broken.impl.sparse_off = True
    batch = batch_of(MIXED)
    metadata = builder.build(0, batch.common)
    assert torch.allclose(run(broken, metadata, batch).double(), batch.dense(), atol=1e-5)
    run(sound, metadata, batch)
    assert sound.impl.sparse_counter.read()["chunks"] == 2 and broken.impl.sparse_counter.read()["failures"] == 0


def test_a_step_that_cannot_be_split_is_the_parents(vllm: FakeVllm, caplog, monkeypatch) -> None:
    _, builder = one_layer(vllm)
    batch = batch_of(MIXED)

    def fails(*arguments: Any) -> Any:
        raise AttributeError("no such field")

    monkeypatch.setattr(vllm.of("vllm_builder"), "split_step", fails)
    for _ in range(5):
        assert builder.build(0, batch.common).common is batch.common
    assert [line[:44] for line in log_lines(caplog)] == [
        *["sparse prefill failed to split a step; PAREN"] * 3,
        "sparse prefill is off until the engine ends:",
    ]


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


def test_declined_chunks_are_counted(vllm: FakeVllm) -> None:
    """Long prompts whose chunks are too short: they run dense, and the statistics say so."""
    layer, builder = one_layer(vllm, min_prefill_tokens=512)
    assert isinstance(builder.build(0, batch_of([(500, 700), (1, 700), (200, 210)]).common), ParentMetadata)
    assert isinstance(builder.build(0, batch_of([(512, 700), (300, 400)]).common), SparseStep)
    assert layer.impl.sparse_counter.read()["declined"] == 2


def test_the_density_is_logged_by_later_steps_of_any_kind(vllm: FakeVllm, caplog) -> None:
    caplog.set_level(logging.INFO)
    layer, builder = one_layer(vllm, log_seconds=60)
    batch = batch_of([(300, 300)])
    run(layer, builder.build(0, batch.common), batch)
    decode = batch_of([(1, 300)]).common
    for _ in range(3):
        builder.build(0, decode)
    lines = [line for line in log_lines(caplog) if "sparse prefill so far: 1 chunks of 300 tokens" in line]
    assert len(lines) == 1
