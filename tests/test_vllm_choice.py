"""Which class a kind of layer gets, over stand-ins for vLLM; what is refused, and what the log says at the start."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from typing import Any

import pytest
import torch
from paged import MIXED, SMALL
from vllm_layers import batch_of, one_layer, run
from vllm_stubs import (
    FakeVllm,
    ParentBuilder,
    ParentImpl,
    ParentMetadata,
    engine_config,
    log_lines,
)

from flexprefill_fa.integrations.vllm import statistics
from flexprefill_fa.integrations.vllm_plan import SparseStep


def test_the_class_for_a_layer(vllm: FakeVllm) -> None:
    backend = vllm.choose(engine_config(**SMALL))
    assert issubclass(backend, vllm.parent) and backend.full_cls_name() != vllm.parent.full_cls_name()
    assert backend.get_name() == "PARENT", "vLLM's own code branches on the name"
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
        ({"kv_cache_dtype": "float16"}, "a KV cache of float16"),
        ({"use_batch_invariant": True}, "batch invariance, which a selection that depends on its chunk cannot keep,"),
    ],
)
def test_layers_that_cannot_run_sparse_get_the_parent_itself(vllm: FakeVllm, caplog, asked: dict, words: str) -> None:
    caplog.set_level(logging.INFO)
    config = engine_config(**SMALL)
    for _ in range(3):
        assert vllm.choose(config, **asked) is vllm.parent
    assert log_lines(caplog) == [f"sparse prefill: layers with {words} are served by PARENT alone"], "said once"
    assert caplog.records[-1].levelno == logging.WARNING
    assert vllm.choose(config) is not vllm.parent
    assert vllm.choose(engine_config(**SMALL), **asked) is vllm.parent
    assert len(log_lines(caplog)) == 2, "another engine says it again"


def test_parents_whose_cache_cannot_be_read(vllm: FakeVllm, monkeypatch) -> None:
    monkeypatch.setattr(vllm.parent, "forward_includes_kv_cache_update", True)
    assert vllm.choose(engine_config(**SMALL)) is vllm.parent
    monkeypatch.undo()
    if hasattr(vllm.parent, "get_kv_cache_shape"):
        monkeypatch.setattr(vllm.parent, "get_kv_cache_shape", staticmethod(lambda *shape: shape[:3]))
    else:
        packed = classmethod(lambda kind, spec: dataclasses.replace(spec, state_content_bytes=72))
        monkeypatch.setattr(vllm.parent, "customize_spec", packed)
    assert vllm.choose(engine_config(**SMALL)) is vllm.parent


def test_bad_engines_are_refused_before_they_start(vllm: FakeVllm) -> None:
    with pytest.raises(ValueError, match="unknown setting 'gama'"):
        vllm.choose(engine_config(gama=0.9))
    vllm.cuda = False
    with pytest.raises(ValueError, match="is for CUDA GPUs, got"):
        vllm.choose(engine_config(**SMALL))


def test_models_whose_backend_vllm_chooses_by_other_rules_are_refused(vllm: FakeVllm) -> None:
    config = engine_config(**SMALL)
    config.model_config.hf_text_config.global_head_dim = 32
    assert vllm.choose(config) is not vllm.parent
    config.model_config.hf_text_config.global_head_dim = 64
    with pytest.raises(ValueError, match="head_dim 32 and global_head_dim 64: start vLLM without --attention-backend"):
        vllm.choose(config)
    config = engine_config(**SMALL)
    config.diffusion_config = object()
    with pytest.raises(ValueError, match="a diffusion language model: start vLLM without"):
        vllm.choose(config)


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        ({"sliding": True}, {}),
        ({"attention_chunk_size": 64}, {}),
        ({}, {"parallel_config.decode_context_parallel_size": 2}),
        ({}, {"parallel_config.use_ubatching": True}),
        ({}, {"cache_config.kv_sharing_fast_prefill": True}),
    ],
)
def test_groups_that_cannot_run_sparse(vllm: FakeVllm, caplog, spec: dict[str, Any], change: dict[str, Any]) -> None:
    caplog.set_level(logging.INFO)
    config = engine_config(**SMALL)
    for path, value in change.items():
        part, _, name = path.partition(".")
        setattr(getattr(config, part), name, value)
    backend = vllm.choose(config)
    vllm.layer(backend, config, "layer.0")
    builder = vllm.builder(backend, config, ["layer.0"], vllm.spec(**spec))
    assert isinstance(builder.build(0, batch_of([(300, 300)]).common), ParentMetadata)
    found = [record for record in caplog.records if "PARENT serves these layers alone" in record.getMessage()]
    assert len(found) == 1 and found[0].levelno == logging.WARNING


def test_the_log_at_engine_start(vllm: FakeVllm, caplog) -> None:
    caplog.set_level(logging.INFO)
    one_layer(vllm)
    (line,) = log_lines(caplog)
    assert "1 of 1 layers run long prefill chunks sparse, PARENT the rest: streaming_llm (sink 0, window 128" in line
    assert ", kernel CPU, for prefill chunks" in line, "what runs, not what was asked for"


@pytest.mark.parametrize(
    ("settings", "scheduler", "words"),
    [
        ({}, {}, None),
        ({"min_prefill_tokens": 1008}, {}, None),
        ({"min_prefill_tokens": 1009}, {}, "a chunk has at most 1008 queries (min_prefill_tokens is 1009)"),
        ({"min_prefill_tokens": 600}, {"long_prefill_token_threshold": 512}, "a chunk has at most 512 queries"),
        ({"min_prefill_tokens": 600}, {"max_num_scheduled_tokens": 256}, "a chunk has at most 240 queries"),
        ({"min_prompt_tokens": 5000}, {}, "nothing will run sparse: prompts have at most 4096 tokens"),
    ],
)
def test_engines_whose_chunks_are_too_short_are_warned_of(
    vllm: FakeVllm, caplog, settings: dict, scheduler: dict, words: str | None
) -> None:
    config = engine_config(**{**SMALL, **settings})
    vars(config.scheduler_config).update(scheduler)
    backend = vllm.choose(config)
    vllm.layer(backend, config, "layer.0")
    vllm.builder(backend, config, ["layer.0"])
    vllm.builder(backend, config, ["layer.0"])
    lines = log_lines(caplog)  # warnings alone
    assert len(lines) == (words is not None) and all(str(words) in line for line in lines)


def test_a_model_without_sparse_layers_is_warned_of(vllm: FakeVllm, caplog) -> None:
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    vllm.layer(backend, config, "layer.0", sliding_window=64)
    vllm.builder(backend, config, ["layer.0"])
    assert log_lines(caplog) == ["sparse prefill: no layer of this model can run sparse; PARENT serves it alone"]


def test_classes_derived_from_ours_are_the_parents(vllm: FakeVllm, caplog) -> None:
    """vLLM derives builders and layers of its own, which rearrange the requests of a step."""
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    vllm.layer(backend, config, "layer.0")

    class Pooling(backend.get_builder_cls()):
        pass

    builder = Pooling(vllm.spec(), ["layer.0"], config, torch.device("cpu"))
    assert isinstance(builder.build(0, batch_of([(300, 300)]).common), ParentMetadata)
    assert "Pooling rearranges the requests of a step, so PARENT serves" in log_lines(caplog)[-1]

    class PoolingImpl(backend.get_impl_cls()):
        pass

    assert PoolingImpl(4, 32, 1.0, 2, None, None, "auto", None, "decoder", None).sparse_counter is None


@pytest.mark.parametrize("tag", ["eagle_head", "draft_model", "dspark_head", "dflash2_candidate_selector"])
def test_layers_of_a_draft_model_stay_dense(vllm: FakeVllm, monkeypatch, tag: str) -> None:
    """Also where a runner hands them the target's metadata, and they are not counted."""
    config = engine_config(**SMALL)
    backend = vllm.choose(config)
    target = vllm.layer(backend, config, "layer.0")
    monkeypatch.setattr(sys.modules["vllm.compilation.backends"], "model_tag", tag)
    draft = vllm.layer(backend, config, "draft.0")
    builder = vllm.builder(backend, config, ["layer.0", "draft.0"])
    batch = batch_of(MIXED)
    metadata = builder.build(0, batch.common)
    assert isinstance(metadata, SparseStep)
    assert torch.allclose(run(draft, metadata, batch).double(), batch.dense(), atol=1e-5)
    worker = types.SimpleNamespace(vllm_config=config)
    assert list(statistics(worker)) == ["layer.0"] and target.impl.sparse_counter is not None
