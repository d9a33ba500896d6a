"""enable_sparse_prefill: what it sets and gives back, and the statistics that it keeps."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
import transformers
from hf_models import SMALL, SPARSE, prompt, run, state, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexprefill_fa import (
    FlexPrefillConfig,
    PeakPrefillConfig,
)
from flexprefill_fa.integrations import hf_attention
from flexprefill_fa.integrations.transformers import (
    NAME,
    collect_statistics,
    default_correction,
    describe_sparse_prefill,
    enable_sparse_prefill,
)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


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
        monkeypatch.setattr("flexprefill_fa.calls._known", {})  # planned under another limit
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


@pytest.mark.parametrize(
    ("name", "padded", "prefix", "own"),
    [("llama", 0, 0, True), ("llama", 100, 0, False), ("llama", 0, 150, False), ("windowed", 0, 0, False)],
    ids=["whole", "padded", "behind a prefix", "windowed"],
)
@torch.no_grad()
def test_a_dense_prompt_goes_to_the_models_sdpa_where_nothing_is_masked(
    name: str, padded: int, prefix: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed = transformers.MistralConfig(**SMALL, sliding_window=100)
    model: Any = transformers.MistralForCausalLM(windowed).eval() if name == "windowed" else tiny_model(name)
    ids = prompt(1, 400)
    mask = (torch.arange(400) >= padded).long()[None]

    def logits() -> Tensor:
        cache = model(ids[:, :prefix], use_cache=True).past_key_values if prefix else None
        return model(ids[:, prefix:], attention_mask=mask, past_key_values=cache).logits[:, padded:]

    seen: list[int] = []
    sdpa = hf_attention.sdpa_attention_forward

    def counted(module: Any, query: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(query.shape[2])
        return sdpa(module, query, *rest, **named)

    monkeypatch.setattr(hf_attention, "sdpa_attention_forward", counted)
    expected = logits()
    with enable_sparse_prefill(model, SPARSE, min_prompt_tokens=1000):
        torch.testing.assert_close(logits(), expected, atol=1e-5, rtol=1e-5)
    layers = model.config.num_hidden_layers
    assert seen.count(400 - prefix) == (layers if own else 0)


def test_a_dense_prompt_that_requires_grad_is_refused(llama: PreTrainedModel) -> None:
    for least in (1, 1000):
        with (
            enable_sparse_prefill(llama, SPARSE, min_prompt_tokens=least),
            pytest.raises(ValueError, match="requires grad"),
        ):
            llama(prompt(1, 400))


def test_lengths_from_which_prompts_run_sparse() -> None:
    """Without a config from 4,097 tokens on, with one from where the selector leaves something out."""
    model = tiny_model("llama")
    for arguments, least in (((), 4097), ((PeakPrefillConfig(),), 385), ((FlexPrefillConfig(),), 1025)):
        with enable_sparse_prefill(model, *arguments):
            assert {layer.min_prompt_tokens for layer in describe_sparse_prefill(model)} == {least}


@needs.mean_correction
def test_without_a_config(llama: PreTrainedModel) -> None:
    """The default selector with tilted means where layers can have them, and it runs: dropped blocks show."""
    dense = run(llama, 3000).logits
    with enable_sparse_prefill(llama, min_prompt_tokens=1, statistics="density") as handle:
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
