"""A model with a compiled prefill, called directly: with the cache that it makes itself, and without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from hf_models import prompt, tiny_model
from transformers import DynamicCache, PreTrainedModel

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import compile_prefill, enable_sparse_prefill

LENGTH = 700
SPARSE = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
PADDED = (torch.arange(LENGTH) >= torch.tensor([[0], [130]])).long()


def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family, layers=1) if family == "llama" else FAMILIES[family]()


NO_CACHE: dict[str, Any] = {"use_cache": False}
CALLS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "llama": [
        *[(1, {}), (2, {}), (2, {"attention_mask": PADDED})],
        *[(2, {**NO_CACHE, "attention_mask": PADDED}), (2, {"attention_mask": torch.ones_like(PADDED)})],
    ],
    "gemma2": [(2, NO_CACHE)],  # a sliding window and capped scores
}


@pytest.mark.parametrize("family", CALLS)
def test_direct_calls(family: str) -> None:
    """Batches, padding, caches and none, one after another: logits as uncompiled, and not as dense."""
    model: Any = model_of(family)

    def run(batch: int, arguments: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(prompt(batch, LENGTH), **arguments)

    calls = CALLS[family]
    dense = [run(*call) for call in calls]
    with enable_sparse_prefill(model, SPARSE, statistics="density") as sparse:
        expected = [run(*call) for call in calls]
        with compile_prefill(model):
            for (batch, arguments), plain, without in zip(calls, expected, dense, strict=True):
                real = arguments.get("attention_mask", torch.ones(batch, LENGTH)).bool()
                for layer in sparse.statistics.values():
                    layer.kept_blocks.fill_(-1)  # the compiled run has to write its own
                found = run(batch, arguments)
                assert sparse.statistics
                assert all(
                    layer.kept_blocks.min() > 0 and layer.density.max() < 0.9 for layer in sparse.statistics.values()
                )
                torch.testing.assert_close(found.logits[real], plain.logits[real], atol=1e-4, rtol=1e-4)
                assert (found.logits - without.logits)[real].abs().max() > 0.01, "dense"
                assert_same_cache(found.past_key_values, plain.past_key_values, cached="use_cache" not in arguments)


def assert_same_cache(found: Any, expected: Any, *, cached: bool) -> None:
    if not cached:
        assert found is None and expected is None
        return
    assert isinstance(found, DynamicCache)
    layers: Any = found.layers
    for mine, theirs in zip(layers, expected.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_packed_sequences_without_a_cache() -> None:
    """A traced model with neither cache nor mask looks for packed sequences; a compiled prefill does so if told."""
    model: Any = model_of("llama")
    packed = torch.cat((torch.arange(300), torch.arange(LENGTH - 300)))[None].expand(2, -1)
    arguments = {"use_cache": False, "position_ids": packed}
    with torch.no_grad(), enable_sparse_prefill(model, SPARSE):
        expected = model(prompt(2, LENGTH), **arguments).logits
        whole = model(prompt(2, LENGTH), use_cache=False).logits
        with compile_prefill(model):
            found = model(prompt(2, LENGTH), **arguments).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - whole).abs().max() > 0.01
