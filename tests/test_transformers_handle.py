"""enable_sparse_prefill: what it sets and gives back, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
import transformers
from hf_models import prompt, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from flexprefill_fa import (
    FlashPrefillConfig,
    FlexPrefillConfig,
    PeakPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
)
from flexprefill_fa.integrations.transformers import (
    NAME,
    collect_statistics,
    default_correction,
    describe_sparse_prefill,
    enable_sparse_prefill,
)

SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What switching must leave as it was: the implementation, and what the modules carry."""
    return model.config._attn_implementation, [sorted(vars(module)) for module in model.modules()]


def run(model: PreTrainedModel, length: int = 400, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(prompt(1, length), **arguments)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_given_back(implementation: str) -> None:
    model = tiny_model("qwen2", attn_implementation=implementation)
    before, dense = state(model), run(model).logits
    with enable_sparse_prefill(model, SPARSE, statistics="density") as handle:
        assert model.config._attn_implementation == NAME
        sparse = run(model).logits
    assert state(model) == before
    assert len(handle.statistics) == 2, "statistics can be read afterwards"
    assert (sparse - dense).abs().max() > 0.01
    assert torch.equal(run(model).logits, dense)
    handle.disable()
    assert state(model) == before


def test_nested_contexts(llama: PreTrainedModel) -> None:
    before = state(llama)
    with enable_sparse_prefill(llama, SPARSE, statistics="density") as outer:
        with enable_sparse_prefill(llama, FlexPrefillConfig(gamma=1.0, min_budget=1), statistics="density") as inner:
            run(llama)
        assert outer.statistics == {} and all((layer.density == 1).all() for layer in inner.statistics.values())
        assert llama.config._attn_implementation == NAME
        run(llama)
        assert all((layer.density < 1).any() for layer in outer.statistics.values())
        assert all((layer.density == 1).all() for layer in inner.statistics.values())
    assert state(llama) == before


def test_an_exception_inside_the_context(llama: PreTrainedModel) -> None:
    before = state(llama)
    with pytest.raises(KeyError), enable_sparse_prefill(llama, SPARSE):
        raise KeyError
    assert state(llama) == before


def test_disable_without_a_context(llama: PreTrainedModel) -> None:
    before = state(llama)
    handle = enable_sparse_prefill(llama)
    assert state(llama) != before
    handle.disable()
    assert state(llama) == before


def test_handles_switched_off_in_any_order(llama: PreTrainedModel) -> None:
    before = state(llama)
    first = enable_sparse_prefill(llama, FlexPrefillConfig(gamma=1.0, min_budget=1), statistics="density")
    second = enable_sparse_prefill(llama, SPARSE, statistics="density")
    first.disable()
    assert llama.config._attn_implementation == NAME
    run(llama)
    assert first.statistics == {} and all((layer.density < 1).any() for layer in second.statistics.values())
    second.disable()
    assert state(llama) == before


@pytest.mark.parametrize("handles", [1, 2])
def test_a_sparse_model_can_go(handles: int) -> None:
    model = tiny_model("llama")
    gone = weakref.ref(model)
    kept = [enable_sparse_prefill(model, SPARSE) for _ in range(handles)]
    del model
    gc.collect()
    assert gone() is None
    for handle in kept:
        handle.disable()


def test_gradients_are_refused(llama: PreTrainedModel) -> None:
    with enable_sparse_prefill(llama, SPARSE), pytest.raises(ValueError, match=r"requires grad.*torch\.no_grad"):
        llama(prompt(1, 400))


def test_a_long_dense_prompt_with_padding_builds_no_square_mask(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a limit it runs FlexAttention over every block instead; the result is the same."""
    padded = torch.ones(1, 400).long()
    padded[0, :100] = 0
    with enable_sparse_prefill(llama, SPARSE, min_prompt_tokens=1000):
        expected = run(llama, attention_mask=padded).logits
        monkeypatch.setattr("flexprefill_fa.dense.MAX_DENSE_MASK_TOKENS", 200)
        monkeypatch.setattr("flexprefill_fa.dispatch.dense_attention", None)
        got = run(llama, attention_mask=padded).logits
    torch.testing.assert_close(got[:, 100:], expected[:, 100:], atol=1e-5, rtol=1e-5)


def test_statistics(llama: PreTrainedModel) -> None:
    with enable_sparse_prefill(llama, SPARSE, statistics="recall") as handle:
        assert handle.statistics == {}
        run(llama)
        first = handle.statistics
        run(llama, 100)
    assert sorted(first) == [0, 1]
    for layer in first.values():
        assert layer.density.shape == layer.js_distance.shape == layer.kept_blocks.shape == (1, 4)
        assert layer.recall is not None and layer.recall.shape == (1, 4)
        assert ((layer.recall >= layer.density.min() / 2) & (layer.recall <= 1 + 1e-5)).all()
        assert (layer.kept_blocks <= 10).all() and (layer.kept_blocks >= 7).all()
        torch.testing.assert_close(layer.density, layer.kept_blocks / 10)
    with enable_sparse_prefill(llama, SPARSE) as handle:
        run(llama)
    assert handle.statistics == {}


def test_min_prompt_tokens(llama: PreTrainedModel) -> None:
    with enable_sparse_prefill(llama, SPARSE, min_prompt_tokens=401, statistics="density") as handle:
        run(llama, 400)
        assert handle.statistics == {}
        run(llama, 401)
        assert len(handle.statistics) == 2


def test_by_attn_implementation_alone(llama: PreTrainedModel) -> None:
    """The name is FlexPrefill's, and its default settings apply: short prompts are dense."""
    dense = run(llama).logits
    llama.set_attn_implementation(NAME)
    try:
        assert [layer.config for layer in describe_sparse_prefill(llama)] == [FlexPrefillConfig()] * 2
        torch.testing.assert_close(run(llama).logits, dense, atol=1e-5, rtol=1e-5)
    finally:
        llama.set_attn_implementation("sdpa")


@needs.mean_correction
def test_without_a_config(llama: PreTrainedModel) -> None:
    """The default selector with tilted means where layers can have them, and it runs: dropped blocks show."""
    dense = run(llama, 3000).logits
    with enable_sparse_prefill(llama, statistics="density") as handle:
        assert [layer.config for layer in describe_sparse_prefill(llama)] == [PeakPrefillConfig()] * 2
        sparse = run(llama, 3000).logits
        density = handle.statistics[0].density
        assert "tilted means" in str(describe_sparse_prefill(llama))
    with enable_sparse_prefill(llama, PeakPrefillConfig(), mean_correction="tilted"):
        torch.testing.assert_close(run(llama, 3000).logits, sparse)
    with enable_sparse_prefill(llama, PeakPrefillConfig()):
        assert (run(llama, 3000).logits - sparse).abs().max() > 1e-4
    assert (density < 1).any() and (sparse - dense).abs().max() > 0.01
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)).eval()
    with enable_sparse_prefill(gemma):
        assert "tilted" not in str(describe_sparse_prefill(gemma))
    assert (default_correction(llama), default_correction(gemma)) == ("tilted", False)


def test_an_old_torch_on_the_cpu_goes_without_mean_correction(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    assert default_correction(llama) is False
    with pytest.raises(
        ValueError, match=r"mean_correction cannot be combined .* needs torch 2\.13, got torch 2\.11\.0"
    ):
        enable_sparse_prefill(llama, SPARSE, mean_correction="tilted")


def test_save_pretrained_while_enabled(llama: PreTrainedModel, tmp_path: Path) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config._attn_implementation != NAME
    assert torch.equal(run(loaded).logits, run(llama).logits)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "fields", "runs", "why"),
    [
        ("Llama", {}, "sparse", "it attends to the whole prompt"),
        ("Mistral", {"sliding_window": 64}, "window", "a sliding window of 64 tokens"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
            "window",
            "a sliding window of 64 tokens",
        ),
        (
            "Gemma2",
            {"sliding_window": 64},
            "window",
            "a sliding window of 64 tokens; scores capped at 50 by a score_mod",
        ),
        (
            "Gemma2",
            {"layer_types": ["full_attention"] * 2},
            "sparse",
            "it attends to the whole prompt; scores capped at 50 by a score_mod",
        ),
        (
            "GptOss",
            {"num_local_experts": 2, "layer_types": ["full_attention"] * 2},
            "dense",
            "attention sinks need a log-sum-exp, which the CPU kernel does not give",
        ),
    ],
)
def test_what_layers_are_said_to_do(name: str, fields: dict[str, Any], runs: str, why: str) -> None:
    config = getattr(transformers, f"{name}Config")(**SMALL, **fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with enable_sparse_prefill(model, SPARSE, min_prompt_tokens=300):
        first = describe_sparse_prefill(model)[0]
    assert (first.layer, first.runs, first.why) == (0, runs, why)
    assert (first.config, first.min_prompt_tokens) == ((SPARSE, 300) if runs == "sparse" else (None, None))


def test_a_config_for_each_layer(llama: PreTrainedModel) -> None:
    other = StreamingLLMConfig(sink=128, window=128)

    def described(*arguments: Any, **settings: Any) -> list[Any]:
        with enable_sparse_prefill(llama, *arguments, **settings):
            return [layer.config for layer in describe_sparse_prefill(llama)]

    assert described(SPARSE) == [SPARSE, SPARSE]
    assert described({1: other}) == [None, other]
    assert described(lambda layer: other if layer == 0 else SPARSE) == [other, SPARSE]
    assert described(SPARSE, dense_layers=(0,)) == [None, SPARSE]
    assert described(SPARSE, dense_layers=[-1]) == [SPARSE, None]
    before = state(llama)
    with pytest.raises(ValueError, match="the model's attention layers are 0 to 1, got a setting for layer 2"):
        enable_sparse_prefill(llama, {2: other})
    with pytest.raises(ValueError, match="got a setting for layer 7"):
        enable_sparse_prefill(llama, SPARSE, dense_layers=(7,))
    with pytest.raises(TypeError, match=r"dense_layers must be layer indices such as \(0, 1\), got 1"):
        enable_sparse_prefill(llama, SPARSE, dense_layers=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a selector config"):
        enable_sparse_prefill(llama, lambda layer: "flexprefill")  # type: ignore[arg-type]
    assert state(llama) == before


@pytest.mark.parametrize(
    "config",
    [
        FlashPrefillConfig(alpha=0.9, sink_blocks=0, window_blocks=1, last_full_blocks=0),
        StreamingLLMConfig(sink=0, window=128),
        VerticalSlashConfig(vertical_size=1, slash_size=1),
    ],
    ids=lambda config: config.name,
)
def test_every_selector(llama: PreTrainedModel, config: Any) -> None:
    dense = run(llama, length=600).logits
    with enable_sparse_prefill(llama, config, min_prompt_tokens=1, statistics="density") as handle:
        assert (run(llama, length=600).logits - dense).abs().max() > 0.01
    assert all(layer.density.mean() < 0.95 for layer in handle.statistics.values())


def test_dense_layers_compute_what_the_model_does(llama: PreTrainedModel) -> None:
    dense = run(llama).logits
    with enable_sparse_prefill(llama, SPARSE, dense_layers=(0, 1), statistics="density") as handle:
        torch.testing.assert_close(run(llama).logits, dense, atol=1e-5, rtol=1e-5)
    assert handle.statistics == {}
    with enable_sparse_prefill(llama, SPARSE, dense_layers=(0,), statistics="density") as handle:
        assert (run(llama).logits - dense).abs().max() > 0.01
    assert list(handle.statistics) == [1]


def test_statistics_are_collected_on_request(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call enable_sparse_prefill\(model\) first"):
        collect_statistics(llama)
    with enable_sparse_prefill(llama, {0: FlexPrefillConfig(gamma=0.5, tau=0.8, min_budget=1)}) as handle:
        with collect_statistics(llama, recall=True) as found:
            with pytest.raises(ValueError, match="no sparse prefill has run"):
                found.latest()
            run(llama)
        first = found.latest()
        run(llama, length=300)
        assert torch.equal(found.latest().density, first.density), "after the context nothing is collected"
        assert handle.statistics[0].recall is not None
    assert first.layers == (0,) and first.density.shape == (1, 1, 4) and first.selectors == ("flexprefill",)
    assert (first.density > 0).all() and (first.density < 1).all()
    assert first.recall is not None and (first.recall > 0.3).all() and (first.recall <= 1).all()
    assert {first.pattern(0, head) for head in range(4)} <= {"query_aware", "vertical_slash"}
    assert first.save_heat_map(tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    assert len(first.table().splitlines()) == 3  # title, names, layer 0


@needs.mean_correction
def test_mean_correction_changes_the_output_and_refuses_what_it_cannot_do(llama: PreTrainedModel) -> None:
    dense = run(llama).logits
    errors = []
    for correction in (False, True):
        with enable_sparse_prefill(llama, SPARSE, mean_correction=correction):
            errors.append(((run(llama).logits - dense).norm() / dense.norm()).item())
    assert errors[1] != pytest.approx(errors[0], rel=1e-3)
    with pytest.raises(ValueError, match="mean_correction must be True, False or 'tilted', got 1"):
        enable_sparse_prefill(llama, SPARSE, mean_correction=1)  # type: ignore[arg-type]
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)).eval()
    with pytest.raises(
        ValueError, match=r"mean_correction cannot be combined with what layer 1 needs: .* capped at 50"
    ):
        enable_sparse_prefill(gemma, SPARSE, mean_correction=True)


def test_other_models_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        enable_sparse_prefill(t5, SPARSE)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    with pytest.raises(ValueError, match="BertModel"):
        enable_sparse_prefill(bert, SPARSE)
    doge = transformers.DogeForCausalLM(transformers.DogeConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}))
    with pytest.raises(ValueError, match=r"DogeForCausalLM cannot .* layer 0: it computes a mask of its own"):
        enable_sparse_prefill(doge, SPARSE)
    with pytest.raises(TypeError, match=r"model must be a transformers PreTrainedModel, got Linear"):
        enable_sparse_prefill(nn.Linear(2, 2), SPARSE)  # type: ignore[arg-type]


def test_settings_that_are_refused(llama: PreTrainedModel) -> None:
    before = state(llama)
    with pytest.raises(TypeError, match=r"config must be a selector config such as PeakPrefillConfig.*, got float"):
        enable_sparse_prefill(llama, 0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config must map layer indices to selector configs, got the keys \['gamma'\]"):
        enable_sparse_prefill(llama, {"gamma": 0.9})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistics must be None, 'density' or 'recall', got 'all'"):
        enable_sparse_prefill(llama, SPARSE, statistics="all")
    with pytest.raises(ValueError, match="min_prompt_tokens must be at least 1, got 0"):
        enable_sparse_prefill(llama, SPARSE, min_prompt_tokens=0)
    assert state(llama) == before


def test_a_mask_of_the_callers_own_runs_dense_and_says_so(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    mask = torch.ones(1, 1, 401, 401).tril().bool()
    mask[..., 200:, :100] = False
    with torch.no_grad():
        dense = llama(prompt(1, 401), attention_mask=mask).logits
        with enable_sparse_prefill(llama, SPARSE), caplog.at_level("WARNING"):
            torch.testing.assert_close(llama(prompt(1, 401), attention_mask=mask).logits, dense, atol=1e-5, rtol=1e-5)
    assert "layer 0 (LlamaAttention) runs dense: it was given an attention mask" in caplog.text


def test_calls_that_are_refused(llama: PreTrainedModel) -> None:
    gaps = torch.ones(1, 400).long()
    gaps[0, 100:110] = 0
    with enable_sparse_prefill(llama, SPARSE):
        with pytest.raises(ValueError, match="to be one run, got a row with gaps"):
            run(llama, attention_mask=gaps)
        with pytest.raises(ValueError, match="output_attentions"):
            run(llama, output_attentions=True)
    model = tiny_model("llama", attention_dropout=0.1).train()
    with enable_sparse_prefill(model, SPARSE), pytest.raises(ValueError, match=r"got dropout 0.1; call model.eval\(\)"):
        run(model)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_static_caches(llama: PreTrainedModel, gamma: float) -> None:
    """Their keys are longer than the prompt: the queries must not be taken for the cache's last positions."""
    cache = StaticCache(config=llama.config, max_cache_len=500)
    with enable_sparse_prefill(llama, FlexPrefillConfig(gamma=gamma, min_budget=1)):
        torch.testing.assert_close(run(llama, past_key_values=cache).logits, run(llama).logits, atol=1e-5, rtol=1e-5)
