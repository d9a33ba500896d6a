"""What SGLang finds under the name flexprefill: registration, engines that are refused or stay dense, what they say."""

from __future__ import annotations

import gc
import logging
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_engine import (
    FOLDER,
    SMALL,
    Step,
    configuration,
    install,
    make_engine,
    make_runner,
    ours,
    parent_class,
    sglang,
    sglang_in_place,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def engine_modules() -> Iterator[None]:
    with sglang_in_place():
        yield


def logged(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sglang.flexprefill_fa"]


def start(change: Callable[[Any, Any], None]) -> Any:
    """The backend of an engine whose runner and configuration were changed."""
    sglang("layers.attention.attention_registry").ATTENTION_BACKENDS["planned"] = parent_class()
    runner, config = make_runner(), configuration(**SMALL)
    change(runner, config)
    install(config)
    return ours("sglang").create(runner)


def setting(path: str, value: Any) -> Callable[[Any, Any], None]:
    """A change of `runner.…` or `config.…`."""

    def change(runner: Any, config: Any) -> None:
        owner: Any = {"runner": runner, "config": config}[path.split(".")[0]]
        *parents, name = path.split(".")[1:]
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)

    return change


def test_registering() -> None:
    """SGLang may load plug-ins more than once."""
    integration, registry = ours("sglang"), sglang("layers.attention.attention_registry").ATTENTION_BACKENDS
    choices = sglang("arg_groups.choices").ATTENTION_BACKEND_CHOICES
    for _ in range(2):
        integration.register()
        assert registry["flexprefill"] is integration.create and choices.count("flexprefill") == 1
    registry["flexprefill"] = parent_class()
    with pytest.raises(ValueError, match="the attention backend flexprefill is taken by sglang_engine"):
        integration.register()


def test_nothing_is_missing_from_this_sglang(monkeypatch) -> None:
    version = ours("sglang_version")
    assert version.missing() == []
    assert version.version_problem("0.5.23") is None
    assert version.version_warning("0.5.23") is None and version.version_warning("0.5.23.post1") is None
    assert "never tried with 0.5.30" in version.version_warning("0.5.30")


@pytest.mark.parametrize(
    ("module", "name", "lack"),
    [
        ("mem_cache.memory_pool", "KVWriteLoc", "sglang.srt.mem_cache.memory_pool.KVWriteLoc.for_layer"),
        ("runtime_context", "get_exec", "sglang.srt.runtime_context.get_exec"),
        ("plugins.hook_registry", "HookType", "sglang.srt.plugins.hook_registry.HookType.AFTER"),
    ],
)
def test_a_version_without_what_it_takes_is_refused_by_name(module: str, name: str, lack: str, monkeypatch) -> None:
    monkeypatch.delattr(sglang(module), name)
    with pytest.raises(ValueError, match=rf"written for SGLang 0.5.23; SGLang .* lacks what it needs: .*{lack}"):
        ours("sglang").create(make_runner())


def test_other_signatures_and_fields_are_seen(monkeypatch) -> None:
    base = sglang("layers.attention.base_attn_backend").AttentionBackend
    monkeypatch.setattr(base, "forward_extend", lambda self, q, k, v, batch: None)
    monkeypatch.setattr(ours("sglang_version"), "NEEDED_FIELDS", ("forward_mode", "extend_lens_cpu"))
    assert ours("sglang_version").missing() == [
        "AttentionBackend.forward_extend(q, k, v, layer, forward_batch, save_kv_cache), got (q, k, v, batch)",
        "ForwardBatch.extend_lens_cpu",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("runner.device", "cpu"), "the sparse prefill backend is for CUDA GPUs, got cpu"),
        (
            setting("runner.use_mla_backend", True),
            r"does not serve multi-head latent attention, .* \(LlamaForCausalLM\)",
        ),
        (setting("runner.model_config.is_encoder_decoder", True), "does not serve models of an encoder and a decoder"),
        (setting("config.execution.dllm.dllm_algorithm", "LowConfidence"), "does not serve diffusion language models"),
        (
            setting("config.execution.kernel.attention_backend", "flexprefill"),
            "is for prefill alone, got --attention-backend flexprefill: start SGLang with --prefill-attention-backend",
        ),
        (
            setting("config.backends", ["flexprefill", "flexprefill"]),
            "is for prefill alone, got --decode-attention-backend flexprefill",
        ),
        (
            setting("config.execution.graph.cuda_graph_config.prefill.backend", "full"),
            "cannot run in a captured prefill, .* got --cuda-graph-backend-prefill full, expected breakable or",
        ),
        (
            setting("runner.spec_algorithm.is_eagle", lambda: True),
            "serves no draft model: add --speculative-draft-attention-backend",
        ),
        (
            setting("config.model.json_model_override_args", '{"sparse_prefill": {"peek": 0.1}}'),
            r"json_model_override_args\['sparse_prefill'\]: unknown setting 'peek', expected one of .*peak",
        ),
        (
            setting("config.model.json_model_override_args", '{"sparse_prefil": {"peak": 0.1}}'),
            r"json_model_override_args\['sparse_prefil'\] is no setting: .* under 'sparse_prefill'",
        ),
    ],
)
def test_engines_that_are_refused(change: Callable[[Any, Any], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(change)


@pytest.mark.parametrize(
    "path", ["config.spec.speculative_draft_attention_backend", "config.spec.speculative_attention_mode"]
)
def test_speculative_decoding_with_a_backend_for_its_draft(path: str) -> None:
    def change(runner: Any, config: Any) -> None:
        setting("runner.spec_algorithm.is_eagle", lambda: True)(runner, config)
        setting(path, "decode" if path.endswith("mode") else "fa3")(runner, config)

    assert start(change).sparse_prefill is not None


class OtherPool:
    """Neither of the class that is read here nor near it."""

    dtype = torch.bfloat16


def quantised(runner: Any, config: Any) -> None:
    runner.token_to_kv_pool.dtype = torch.float8_e4m3fn


def folded(runner: Any, config: Any) -> None:
    runner.token_to_kv_pool.kv_cache_layout = "hnd"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting("config.parallel.attn_cp_size", 2), "context parallelism spreads the keys of a request"),
        (setting("config.parallel.attn_dcp_size", 2), "context parallelism spreads the keys of a request"),
        (setting("config.execution.overlap.enable_two_batch_overlap", True), "micro-batches split the chunks"),
        (setting("config.disagg.enable_pdmux", True), "micro-batches split the chunks"),
        (setting("config.execution.deterministic.enable_deterministic_inference", True), "deterministic inference"),
        (setting("runner.enable_hisparse", True), "the keys of a request are not all on the GPU"),
        (setting("runner.kv_index_translator.is_translating", True), "the slots of a unified memory pool move"),
        (setting("runner.token_to_kv_pool", OtherPool()), "a KV cache is a OtherPool with the layout of its own"),
        (folded, "a KV cache is a MHATokenToKVPool with the layout hnd"),
        (quantised, "a KV cache of torch.float8_e4m3fn for a model of torch.bfloat16"),
    ],
)
def test_engines_that_stay_dense(change: Callable[[Any, Any], None], reason: str, caplog) -> None:
    backend = start(change)
    assert type(backend).__name__ == "PlannedBackend"
    (line,) = logged(caplog)
    assert line.startswith(f"sparse prefill: {reason}") and line.endswith("so planned serves this engine alone")
    assert ours("sglang").statistics() == {}


def test_a_model_without_a_layer_that_can_run_sparse(caplog) -> None:
    _, backend = make_engine([{"sliding_window_size": 64}, {"logit_cap": 50.0}])
    assert not hasattr(backend, "sparse_prefill")
    assert logged(caplog)[-1] == "sparse prefill: no layer of this model can run sparse; planned serves it alone"
    runner = make_runner(dtype=torch.float32)
    runner.token_to_kv_pool.dtype = torch.float32
    assert ours("sglang_backend").sparse_layers(runner) == ({}, ["torch.float32"])


def test_layers_whose_keys_are_in_the_pool_for_windows() -> None:
    in_window = ours("sglang_engine").in_the_window_pool
    pool, layer = types.SimpleNamespace(layers_mapping={3: (0, True), 4: (0, False)}), types.SimpleNamespace(layer_id=3)
    assert in_window(pool, layer) and not in_window(types.SimpleNamespace(), layer)
    layer.layer_id = 4
    assert not in_window(pool, layer)


def test_a_draft_model_has_the_parent() -> None:
    backend = start(setting("runner.is_draft_worker", True))
    assert type(backend).__name__ == "PlannedBackend"


def test_engines_whose_prompts_or_chunks_are_too_short_are_warned(caplog) -> None:
    make_engine(min_prefill_tokens=1000, min_prompt_tokens=2000)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "sparse prefill: nothing will run sparse: prompts have at most 1024 tokens (min_prompt_tokens is 2000)",
        "sparse prefill: beside other requests a chunk has at most 512 queries (min_prefill_tokens is 1000), and "
        "shorter chunks run dense: raise --chunked-prefill-size, or lower min_prefill_tokens",
    ]


@pytest.mark.parametrize(
    ("chunked", "most", "context", "longest"),
    [(8192, 16384, 131072, 8192), (8192, 16384, 4096, 4096), (-1, 16384, 131072, 131072), (None, 16384, 4096, 16384)],
)
def test_the_longest_chunk(chunked: int | None, most: int, context: int, longest: int) -> None:
    assert ours("sglang_config").longest_chunk(chunked, most, context) == longest


def test_where_the_settings_are() -> None:
    read, variable = ours("sglang_config").read_settings, ours("sglang_config").VARIABLE
    from flexprefill_fa import FlashPrefillConfig, PeakPrefillConfig

    environment = {variable: '{"selector": "flashprefill", "alpha": 0.2}'}
    assert read("{}", {}).selector == read("", {}).selector == read(None, {}).selector == PeakPrefillConfig()
    assert read('{"num_hidden_layers": 2}', environment).selector == FlashPrefillConfig(alpha=0.2)
    assert read('{"sparse_prefill": {"peak": 0.2}}', environment).selector == PeakPrefillConfig(0.2)
    assert read("{}", {}, 1024).min_prefill_tokens == 512
    assert read('{"window": 64, "backend": "x"}', {}).selector == PeakPrefillConfig(), "fields of the model's own"
    with pytest.raises(ValueError, match="expected under 'sparse_prefill'"):
        read('{"sparse_prefil": {}}', {})
    with pytest.raises(ValueError, match="--json-model-override-args is not JSON"):
        read("{'a': 1}", {})
    with pytest.raises(ValueError, match=f"the environment variable {variable} is not JSON"):
        read("{}", {variable: "peak=0.2"})


def test_what_a_server_says_of_itself() -> None:
    """By a hook of SGLang's own interface, and only where an engine runs sparse."""
    module = sglang("managers.scheduler_components.internal_state")
    make_engine()
    ours("sglang_backend").backends.clear()
    runner, backend = make_engine()
    Step(runner, [(300, 700)]).run(backend)
    answer = types.SimpleNamespace(internal_state={"world_size": 1})
    ours("sglang").add_statistics(answer, None)
    assert answer.internal_state["sparse_prefill"]["layers.0.attn"]["chunks"] == 1
    if FOLDER:  # the real one needs a scheduler
        assert module.SchedulerInternalStateController.get_internal_state.__wrapped__
    else:
        state = module.SchedulerInternalStateController().get_internal_state(None).internal_state
        assert state["world_size"] == 1 and "layers.1.attn" in state["sparse_prefill"]
    del runner, backend
    ours("sglang_backend").backends.clear()
    gc.collect()
    answer = types.SimpleNamespace(internal_state={})
    ours("sglang").add_statistics(answer, None)
    assert answer.internal_state == {}


def test_the_entry_point_and_the_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."sglang.srt.plugins"]\nflexprefill_fa = "flexprefill_fa.integrations.sglang:register"\n'
    ) in project
    assert 'sglang = ["sglang>=0.5.23"]\n' in project
