"""torch.autocast, and models that leave queries and keys in another dtype than values."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hf_models import prompt, tiny_model
from surroundings import CONFIG
from torch import Tensor, nn
from transformers import AttentionInterface
from workloads import structured_qk

from flexprefill_fa import (
    FlexPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.integrations.transformers import collect_statistics, enable_sparse_prefill

EVERYTHING = FlexPrefillConfig(gamma=1.0)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def difference(one: Tensor, other: Tensor) -> float:
    """Relative, over all logits."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [200, 1100], ids=["short", "long"])
def test_a_model_under_autocast(family: str, length: int) -> None:
    model, ids = tiny_model(family), prompt(2, length)
    with torch.autocast("cpu", torch.bfloat16):
        dense = logits(model, ids)
        with enable_sparse_prefill(model, EVERYTHING, min_prompt_tokens=1):
            whole = logits(model, ids)
        with enable_sparse_prefill(model, CONFIG):
            sparse = logits(model, ids)
            cast(Any, model).generate(ids, max_new_tokens=2, do_sample=False)  # and its decode steps
    with enable_sparse_prefill(model, CONFIG):
        in_fp32 = logits(model, ids)
    rounding = difference(dense, logits(model, ids))
    assert difference(whole, dense) < 2 * rounding
    assert difference(sparse, in_fp32) < 2 * rounding
    if length > CONFIG.dense_tokens:
        assert difference(sparse, dense) > 4 * rounding


def test_a_model_prepared_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # one that another test's model left has its precision
    ids = prompt(1, 1100)
    with enable_sparse_prefill(plain := tiny_model("llama"), CONFIG):
        expected = logits(plain, ids)
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tiny_model("llama"))
    rounding = difference(logits(model, ids), logits(plain, ids))
    with enable_sparse_prefill(model, CONFIG):
        assert difference(logits(model, ids), expected) < 2 * rounding


def test_queries_and_keys_left_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As norms and rotary embeddings of some models do, whose own attention casts."""
    model, ids = tiny_model("llama").bfloat16(), prompt(1, 1100)
    with enable_sparse_prefill(model, CONFIG):
        expected = {tokens: logits(model, ids[:, :tokens]) for tokens in (1100, 300, 1)}
        ours = AttentionInterface()["flexprefill"]
        assert ours is not None

        def upcast(module, query, key, value, *arguments, **named):
            out, weights = ours(module, query.float(), key.float(), value, *arguments, **named)
            assert out.dtype == torch.bfloat16
            return out, weights

        monkeypatch.setitem(AttentionInterface._global_mapping, "flexprefill", upcast)
        for tokens in (1100, 300, 1):
            assert torch.equal(logits(model, ids[:, :tokens]), expected[tokens])


@pytest.mark.parametrize("config", [CONFIG, VerticalSlashConfig(256, 256), StreamingLLMConfig(128, 256)])
def test_the_selection_is_that_of_fp32(config) -> None:
    query, key = structured_qk(1, 4, 2, 900, 900, 32)
    expected = select_blocks(query, key, config).to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_blocks(query, key, config).to_dense(), expected)


def test_the_call_casts_as_sdpa_does() -> None:
    query, key = structured_qk(1, 4, 2, 900, 900, 32)
    value = torch.randn(key.shape)
    half = [x.bfloat16() for x in (query, key, value)]
    with torch.no_grad():
        expected = sparse_prefill_attention(half[0], half[1], half[2], CONFIG)
        with torch.autocast("cpu", torch.bfloat16):
            found = sparse_prefill_attention(query, key, value, CONFIG)
            with pytest.raises(TypeError, match="one dtype"):
                sparse_prefill_attention(query, key, half[2], CONFIG)
    assert torch.equal(found, expected)


def test_recall_is_measured_in_fp32() -> None:
    query, key = structured_qk(1, 4, 2, 900, 900, 32)
    selection = select_blocks(query, key, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        found = selection.recall(query, key)
    assert torch.equal(found, selection.recall(query, key))


def test_statistics_under_autocast() -> None:
    model, ids = tiny_model("llama"), prompt(1, 1100)
    with (
        enable_sparse_prefill(model, CONFIG),
        torch.autocast("cpu", torch.bfloat16),
        collect_statistics(model, recall=True) as found,
    ):
        logits(model, ids)
    latest = found.latest()
    assert latest.recall is not None and 0.2 < latest.recall.mean() < 1 and latest.density.mean() < 0.8
