"""enable_sparse_prefill: configs for layers, what layers are said to do, and what it refuses."""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
import transformers
from hf_models import SMALL, SPARSE, prompt, run, state, tiny_model
from torch import nn
from transformers import PreTrainedModel, StaticCache

from flexprefill_fa import FlashPrefillConfig, FlexPrefillConfig, StreamingLLMConfig, VerticalSlashConfig
from flexprefill_fa.integrations.transformers import describe_sparse_prefill, enable_sparse_prefill


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


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
