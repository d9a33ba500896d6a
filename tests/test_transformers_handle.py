"""enable_sparse_prefill: what it sets and gives back, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import prompt, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import NAME, enable_sparse_prefill

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
        monkeypatch.setattr("flexprefill_fa.dense._MAX_DENSE_MASK_TOKENS", 200)
        monkeypatch.setattr("flexprefill_fa.integrations.hf_attention.dense_attention", None)
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
    """Without enable_sparse_prefill the default settings apply: short prompts are dense."""
    dense = run(llama).logits
    llama.set_attn_implementation(NAME)
    try:
        torch.testing.assert_close(run(llama).logits, dense, atol=1e-5, rtol=1e-5)
    finally:
        llama.set_attn_implementation("sdpa")


def test_save_pretrained_while_enabled(llama: PreTrainedModel, tmp_path: Path) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config._attn_implementation != NAME
    assert torch.equal(run(loaded).logits, run(llama).logits)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Mistral", {"sliding_window": 64}, "layer 0: it attends to a sliding window (64 tokens)"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "layer 1: it attends to a sliding window (64 tokens)",
        ),
        ("Gemma2", {}, "sliding window"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2}, "layer 0: it caps its scores (softcap 50.0)"),
        (
            "GptOss",
            {"num_local_experts": 2, "layer_types": ["full_attention"] * 2},
            "layer 0: it has attention sinks (s_aux)",
        ),
    ],
)
def test_layers_that_cannot_be_served(name: str, fields: dict[str, Any], message: str) -> None:
    config = getattr(transformers, f"{name}Config")(**SMALL, **fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    before = state(model)
    with pytest.raises(ValueError) as raised:
        enable_sparse_prefill(model, SPARSE)
    assert message in str(raised.value) and f"{name}ForCausalLM cannot run sparse prefill" in str(raised.value)
    assert state(model) == before
    # The same layers, reached without the check: refused at the first long prompt, not silently dropped.
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"cannot run sparse prefill|asks for another mask"):
        run(model)


def test_chunked_attention_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.config, "attention_chunk_size", 64, raising=False)
    with pytest.raises(ValueError, match="it attends in chunks"):
        enable_sparse_prefill(llama)


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
    with pytest.raises(TypeError, match=r"model must be a transformers PreTrainedModel, got Linear"):
        enable_sparse_prefill(nn.Linear(2, 2), SPARSE)  # type: ignore[arg-type]


def test_settings_that_are_refused(llama: PreTrainedModel) -> None:
    before = state(llama)
    with pytest.raises(TypeError, match=r"config must be a selector config such as FlexPrefillConfig.*, got dict"):
        enable_sparse_prefill(llama, {"gamma": 0.9})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistics must be None, 'density' or 'recall', got 'all'"):
        enable_sparse_prefill(llama, SPARSE, statistics="all")
    with pytest.raises(ValueError, match="min_prompt_tokens must be at least 1, got 0"):
        enable_sparse_prefill(llama, SPARSE, min_prompt_tokens=0)
    assert state(llama) == before


def test_calls_that_are_refused(llama: PreTrainedModel) -> None:
    gaps = torch.ones(1, 400).long()
    gaps[0, 100:110] = 0
    with enable_sparse_prefill(llama, SPARSE):
        with pytest.raises(ValueError, match="to be one run, got a row with gaps"):
            run(llama, attention_mask=gaps)
        with pytest.raises(
            ValueError, match=r"takes a padding mask \[batch, keys\] or none, got .* \(1, 1, 400, 400\)"
        ):
            run(llama, attention_mask=torch.ones(1, 1, 400, 400).tril().bool())
        with pytest.raises(ValueError, match="output_attentions"):
            run(llama, output_attentions=True)
    model = tiny_model("llama", attention_dropout=0.1).train()
    with enable_sparse_prefill(model, SPARSE), pytest.raises(ValueError, match=r"got dropout 0.1; call model.eval\(\)"):
        run(model)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_static_caches_are_refused(llama: PreTrainedModel, gamma: float) -> None:
    """Their keys are longer than the prompt, so the queries would be taken for the cache's last positions."""
    with enable_sparse_prefill(llama, FlexPrefillConfig(gamma=gamma, min_budget=1)):
        with pytest.raises(ValueError, match="static caches"):
            run(llama, past_key_values=StaticCache(config=llama.config, max_cache_len=500))
        with pytest.raises(ValueError, match="static caches"):
            llama.generate(  # type: ignore[operator]
                prompt(1, 400), max_new_tokens=3, do_sample=False, cache_implementation="static"
            )
