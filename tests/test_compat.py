"""The published names: the semantics of the released function, and models switched to a pattern and back."""

from __future__ import annotations

import gc
import math
import re
import weakref
from typing import Any

import pytest
import torch
from hf_models import prompt, tiny_model
from oracle_attention import masked_attention
from oracle_flexprefill import oracle_select
from torch import Tensor
from transformers import PreTrainedModel
from workloads import structured_qk

from flexprefill_fa import (
    FlexPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.compat import flex_prefill_attention, patch_model
from flexprefill_fa.integrations.transformers import collect_statistics, enable_sparse_prefill

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}


def heads_first(length: int, *, batch: int = 1, q_len: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, 4, Lq, 32], key and value [B, 2, L, 32]."""
    query, key = structured_qk(batch, 4, 2, q_len or length, length, 32)
    return query, key, torch.randn(key.shape)


def heads_last(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(("batch", "length", "q_len"), [(1, 700, 700), (2, 513, 513), (1, 640, 300)])
def test_it_is_the_published_selection_in_its_own_layout(batch: int, length: int, q_len: int) -> None:
    tensors = heads_first(length, batch=batch, q_len=q_len)
    config = FlexPrefillConfig(gamma=0.5, tau=0.1, min_budget=128)
    expected, selection = sparse_prefill_attention(*tensors, config, dense="never", return_selection=True)
    out, ratio = flex_prefill_attention(*heads_last(*tensors), 0.5, 0.1, return_computational_ratio=True)
    assert out.shape == (batch, q_len, 4, 32) and out.is_contiguous()
    torch.testing.assert_close(out.transpose(1, 2), expected, **CLOSE)
    kept = selection.to_dense().double().mean().item()
    assert isinstance(ratio, float) and ratio == pytest.approx(kept)
    assert (selection.density() < 1).any()
    if q_len == length:  # sparse has not turned dense
        assert (out.transpose(1, 2) - dense(*tensors)).abs().max() > 0.01


@pytest.mark.parametrize("length", [1, 127, 129, 256, 257, 700])
def test_the_ratio_of_dense_causal_attention_is_about_a_half(length: int) -> None:
    tensors = heads_first(length)
    out, ratio = flex_prefill_attention(*heads_last(*tensors), gamma=1.0, return_computational_ratio=True)
    blocks = math.ceil(length / 128)
    assert ratio == pytest.approx((blocks + 1) / (2 * blocks))
    torch.testing.assert_close(out.transpose(1, 2), dense(*tensors), **CLOSE)


def test_min_budget_none_is_one_block_and_tau_is_off() -> None:
    tensors = heads_first(900)
    query, key, _ = tensors
    _, ratio = flex_prefill_attention(*heads_last(*tensors), 0.3, return_computational_ratio=True)
    oracle = oracle_select(
        query, key, gamma=0.3, tau=0.0, min_budget=1, max_budget=None, block_size=128, variant="published"
    )
    assert ratio == pytest.approx(oracle.keep.mean()) and ratio < 0.4
    _, more = flex_prefill_attention(*heads_last(*tensors), 0.3, min_budget=512, return_computational_ratio=True)
    assert more > ratio
    _, less = flex_prefill_attention(
        *heads_last(*tensors), 0.99, max_budget=192, block_size=64, return_computational_ratio=True
    )
    limited = select_blocks(query, key, FlexPrefillConfig(0.99, 0.0, 64, 192, 64))
    assert less == pytest.approx(limited.to_dense().double().mean().item())


def test_without_tau_no_head_is_query_aware() -> None:
    query, key, value = heads_first(1024)
    tensors = heads_last(0.1 * query, 0.1 * key, value)  # flat heads: block means tell all there is
    settings: list[dict[str, Any]] = [{}, {"tau": 0}, {"tau": 0.1}]
    ratios = [flex_prefill_attention(*tensors, 0.5, return_computational_ratio=True, **given)[1] for given in settings]
    assert ratios[0] == ratios[1] != ratios[2]


@pytest.mark.parametrize(("q_len", "length"), [(256, 256), (1, 700)])
def test_what_keeps_every_block_is_plain_dense_attention(
    q_len: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_selection(*_: object, **__: object) -> None:
        raise AssertionError("selected")

    monkeypatch.setattr("flexprefill_fa.dispatch.run_select_and_attend", no_selection)
    tensors = heads_first(length, q_len=q_len)
    out = flex_prefill_attention(*heads_last(*tensors), 0.5)
    mask = torch.ones(q_len, length).tril(length - q_len).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), expected, **CLOSE)


def test_compiled_in_a_graph_it_reorders_interleaved_heads() -> None:
    tensors = heads_last(*heads_first(600))
    with torch.no_grad():
        expected = flex_prefill_attention(*tensors, 0.5, 0.1, gqa_interleave=True)
        compiled = torch.compile(flex_prefill_attention, fullgraph=True)
        torch.testing.assert_close(compiled(*tensors, 0.5, 0.1, gqa_interleave=True), expected, **CLOSE)


@pytest.mark.parametrize("q_len", [300, 600])
def test_compiled_in_a_graph_it_takes_the_kernel_that_auto_would(q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer queries than keys, whose offset the graph computes, FLASH can serve none."""
    asked: list[bool] = []

    def recorded(*arguments: Any, position_in_graph: bool = False, **more: Any) -> str:
        asked.append(position_in_graph)
        return resolve_backend(*arguments, position_in_graph=position_in_graph, **more)

    monkeypatch.setattr("flexprefill_fa.dispatch.resolve_backend", recorded)
    tensors = heads_last(*heads_first(600, q_len=q_len))
    with torch.no_grad():
        flex_prefill_attention(*tensors, 0.5)
        torch.compile(flex_prefill_attention, fullgraph=True, backend="eager")(*tensors, 0.5)
    assert asked == [False, q_len < 600]


def test_long_prompts_stay_sparse_where_the_cost_model_would_go_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexprefill_fa.dispatch.prefers_dense", lambda *_: True)
    tensors = heads_first(700)
    out, ratio = flex_prefill_attention(*heads_last(*tensors), 0.5, return_computational_ratio=True)
    assert ratio < 0.58
    assert (out.transpose(1, 2) - dense(*tensors)).abs().max() > 0.01


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_interleaved_heads_read_kv_head_h_modulo_hkv(kv_heads: int) -> None:
    query, _ = structured_qk(1, 6, 6, 600, 600, 32)
    _, key = structured_qk(1, 6, kv_heads, 600, 600, 32)
    value = torch.randn(key.shape)
    reads = torch.arange(6) % kv_heads
    repeated = key[:, reads], value[:, reads]
    keep = oracle_select(
        query, repeated[0], gamma=0.5, tau=0.1, min_budget=1, max_budget=None, block_size=128, variant="published"
    ).keep
    expected = masked_attention(query, *repeated, keep, 128)
    tensors = heads_last(query, key, value)
    out, ratio = flex_prefill_attention(*tensors, 0.5, 0.1, gqa_interleave=True, return_computational_ratio=True)
    assert out.is_contiguous()
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, **CLOSE)
    assert ratio == pytest.approx(keep.mean())
    plain = flex_prefill_attention(*tensors, 0.5, 0.1)
    assert ((out - plain).abs().max() > 0.01) == (1 < kv_heads < 6)


def test_softmax_scale_reaches_selection_and_attention() -> None:
    query, key, value = heads_first(700)
    out, ratio = flex_prefill_attention(
        *heads_last(query, key, value), 0.5, softmax_scale=0.05, return_computational_ratio=True
    )
    settings: dict[str, Any] = {"gamma": 0.5, "tau": 0.0, "min_budget": 1, "max_budget": None, "block_size": 128}
    oracle = oracle_select(query, key, scale=0.05, variant="published", **settings)
    torch.testing.assert_close(
        out.transpose(1, 2).double(), masked_attention(query, key, value, oracle.keep, 128, 0.05), **CLOSE
    )
    assert ratio == pytest.approx(oracle.keep.mean())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"gamma": 1.5}, ValueError, r"gamma must be in \(0, 1\], got 1.5"),
        ({"tau": -1}, ValueError, r"tau must be in \[0, 1\], got -1"),
        ({"min_budget": 0}, ValueError, "min_budget must be at least 1, got 0"),
        ({"max_budget": 128}, ValueError, r"max_budget must be at least max\(min_budget, 3 \* block_size\) = 384"),
        ({"block_size": 32}, ValueError, "block_size must be one of"),
        ({"softmax_scale": 0.0}, ValueError, "^softmax_scale must be a positive finite number"),
        ({"gqa_interleave": 1}, TypeError, "gqa_interleave must be True or False, got int"),
        ({"return_computational_ratio": None}, TypeError, "return_computational_ratio must be True or False"),
        ({"q": [1.0]}, TypeError, r"q must be a tensor \[B, L, H, D\], got list"),
        ({"k": torch.zeros(300, 2, 32)}, ValueError, r"k must have shape \[B, L, H, D\], got \[300, 2, 32\]"),
        ({"q": torch.zeros(1, 0, 4, 32)}, ValueError, r"q must not be empty, got shape \[1, 0, 4, 32\]"),
        *(
            (
                {"q": torch.zeros(1, 300, 3, 32), "gqa_interleave": interleave},
                ValueError,
                r"q and k must have query heads that are a multiple of the key heads, "
                r"got \[B, L, H, D\] = \[1, 300, 3, 32\] and \[1, 300, 2, 32\]",
            )
            for interleave in (False, True)
        ),
        ({"q": torch.zeros(2, 300, 4, 32)}, ValueError, r"one batch size, got .* = \[2, 300, 4, 32\] and \[1, 300,"),
        ({"q": torch.zeros(1, 300, 4, 64)}, ValueError, r"one head dim, got .* = \[1, 300, 4, 64\] and \[1, 300,"),
        ({"q": torch.zeros(1, 301, 4, 32)}, ValueError, r"no more queries than keys, got .* = \[1, 301, 4, 32\] and"),
        (
            {"v": torch.zeros(1, 299, 2, 32)},
            ValueError,
            r"k and v must have one shape \[B, L, H, D\], got \[1, 300, 2, 32\] and \[1, 299, 2, 32\]",
        ),
        ({"q": torch.zeros(1, 300, 4, 32, requires_grad=True)}, ValueError, "requires grad"),
    ],
)
def test_errors_say_what_was_expected(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": torch.zeros(1, 300, 4, 32), "gamma": 0.9}
    arguments |= {"k": torch.zeros(1, 300, 2, 32), "v": torch.zeros(1, 300, 2, 32)}
    with pytest.raises(kind, match=message):
        flex_prefill_attention(**(arguments | changes))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(prompt(1, 700)).logits


@pytest.mark.parametrize(
    ("pattern", "settings", "config"),
    [
        (
            "flex_prefill",
            {
                "block_size": 64,
                "flex_prefill_gamma": 0.5,
                "flex_prefill_tau": 0.05,
                "flex_prefill_min_budget": None,
                "flex_prefill_max_budget": 256,
            },
            FlexPrefillConfig(0.5, 0.05, 64, 256, 64),
        ),
        ("flex_prefill", {"flex_prefill_min_budget": 200}, FlexPrefillConfig(min_budget=200)),
        ("flex_prefill", {}, FlexPrefillConfig(0.95, 0.1, 1024, None, 128)),
        ("streaming_llm", {"streaming_llm_sink": 64, "streaming_llm_window": 128}, StreamingLLMConfig(64, 128)),
        (
            "vertical_slash",
            {"vertical_slash_vertical_size": 128, "vertical_slash_slash_size": 64, "block_size": 64},
            VerticalSlashConfig(128, 64, 64),
        ),
    ],
)
def test_patterns_run_sparse_and_default_restores_dense(
    pattern: str, settings: dict[str, Any], config: Any, llama: PreTrainedModel
) -> None:
    before = logits(llama)
    with enable_sparse_prefill(llama, config):
        expected = logits(llama)
    assert patch_model(llama, pattern, settings) is llama
    assert [layer.self_attn._sparse_prefill_plan.config for layer in llama.model.layers] == [config] * 2
    actual = logits(llama)
    torch.testing.assert_close(actual, expected, **CLOSE)
    if getattr(config, "gamma", 0) < 0.95:  # which of so short a prompt may be all of it
        assert (actual - before).abs().max() > 0.01
    patch_model(llama, "default", settings)
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(logits(llama), before)
    with pytest.raises(ValueError, match="enable_sparse_prefill"):
        collect_statistics(llama)


def test_a_later_pattern_takes_the_place_of_an_earlier_one(llama: PreTrainedModel) -> None:
    before = logits(llama)
    window = {"streaming_llm_sink": 0, "streaming_llm_window": 128}
    with enable_sparse_prefill(llama, StreamingLLMConfig(0, 128)):
        expected = logits(llama)
    patch_model(llama, "flex_prefill", {"flex_prefill_gamma": 0.5, "flex_prefill_min_budget": None})
    patch_model(llama, "streaming_llm", window)
    torch.testing.assert_close(logits(llama), expected, **CLOSE)
    with pytest.raises(ValueError, match="streaming_llm_windows"):
        patch_model(llama, "streaming_llm", {"streaming_llm_windows": 1})
    torch.testing.assert_close(logits(llama), expected, **CLOSE)  # a mistake changes nothing
    patch_model(llama, "default")
    patch_model(llama, "default")
    assert torch.equal(logits(llama), before)


def test_default_makes_a_model_dense_that_was_loaded_sparse() -> None:
    model = tiny_model("llama")
    before = logits(model)
    model.set_attn_implementation("flexprefill")
    patch_model(model, "default")
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=2e-4)
    patch_model(model, "streaming_llm", {"streaming_llm_sink": 0, "streaming_llm_window": 128})
    assert (logits(model) - before).abs().max() > 0.01
    patch_model(model, "default")
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=2e-4)


def test_default_ends_every_handle_for_good(llama: PreTrainedModel) -> None:
    before = logits(llama)
    first = enable_sparse_prefill(llama, StreamingLLMConfig(0, 128))
    patch_model(llama, "flex_prefill", {"flex_prefill_gamma": 0.5, "flex_prefill_min_budget": None})
    with enable_sparse_prefill(llama, StreamingLLMConfig(0, 256)):
        patch_model(llama, "default")
        assert torch.equal(logits(llama), before)
    first.disable()
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(logits(llama), before)


def test_a_pattern_outlives_the_handles_before_it(llama: PreTrainedModel) -> None:
    before = logits(llama)
    with enable_sparse_prefill(llama, StreamingLLMConfig(0, 256)):
        patch_model(llama, "streaming_llm", {"streaming_llm_sink": 0, "streaming_llm_window": 128})
        expected = logits(llama)
    assert torch.equal(logits(llama), expected) and not torch.equal(expected, before)
    patch_model(llama, "default")
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("pattern", ["flex_prefill", "default"])
def test_a_patched_model_can_go(pattern: str) -> None:
    model = tiny_model("llama", attn_implementation="flexprefill")
    gone = weakref.ref(model)
    patch_model(model, pattern)
    del model
    gc.collect()
    assert gone() is None


class LLM:
    """Stands for vLLM's class."""


LLM.__module__ = "vllm.entrypoints.llm"


@pytest.mark.parametrize("engine", [LLM, type("MyLLM", (LLM,), {})])
def test_vllm_engines_get_the_name_of_the_backend(engine: type) -> None:
    with pytest.raises(TypeError, match=re.escape('attention_backend="CUSTOM", additional_config={"sparse_prefill"')):
        patch_model(engine(), "flex_prefill", {})


@pytest.mark.parametrize(
    ("pattern", "settings", "kind", "message"),
    [
        ("flash", {}, ValueError, "pattern 'flash' is not here: use pattern 'default'"),
        ("minfer", {}, ValueError, "pattern 'minfer' is not here: use pattern 'vertical_slash'"),
        ("flexprefill", {}, ValueError, "pattern must be one of default, flex_prefill, streaming_llm, vertical_slash"),
        (["flex_prefill"], {}, TypeError, "pattern must be one of default, flex_prefill, .*, got list"),
        ("flex_prefill", {"gamma": 0.9}, ValueError, "unknown key gamma in config, expected of block_size, flex_pre"),
        ("default", {"gama": 0.9}, ValueError, "unknown key gama"),
        ("flex_prefill", [0.9], TypeError, "config must be a mapping such as a dict, got list"),
        ("flex_prefill", {"flex_prefill_gamma": 2}, ValueError, r"^flex_prefill_gamma must be in \(0, 1\], got 2"),
        ("flex_prefill", {"flex_prefill_gamma": None}, TypeError, "^flex_prefill_gamma must be a number, got NoneType"),
        (
            "flex_prefill",
            {"flex_prefill_min_budget": 0},
            ValueError,
            "^flex_prefill_min_budget must be at least 1, got",
        ),
        (
            "flex_prefill",
            {"flex_prefill_max_budget": 512, "flex_prefill_min_budget": 1024},
            ValueError,
            r"^flex_prefill_max_budget must be at least max\(flex_prefill_min_budget, 3 \* block_size\) = 1024, got",
        ),
        ("streaming_llm", {"streaming_llm_window": 0}, ValueError, "^streaming_llm_window must be at least 1, got 0"),
        (
            "vertical_slash",
            {"vertical_slash_slash_size": 0},
            ValueError,
            "^vertical_slash_slash_size must be at least 1",
        ),
        ("vertical_slash", {"block_size": 100}, ValueError, "block_size must be one of"),
    ],
)
def test_wrong_patterns_and_keys(
    pattern: Any, settings: Any, kind: type[Exception], message: str, llama: PreTrainedModel
) -> None:
    with pytest.raises(kind, match=message):
        patch_model(llama, pattern, settings)
    assert llama.config._attn_implementation == "sdpa"


def test_patch_model_wants_a_transformers_model() -> None:
    for pattern in ("flex_prefill", "default"):
        with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
            patch_model(torch.nn.Linear(1, 1), pattern, {})
