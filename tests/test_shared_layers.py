"""Layers that reuse the keys of earlier ones and are given a prompt's last queries alone, as Gemma 4's are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import HEADS, KEY_HEADS, WINDOW
from hf_models import prompt, recorded_layers
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedModel, StaticCache

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import enable_sparse_prefill

LENGTH, PADDING, NEW = 700, 130, 4
EVERYTHING = FlexPrefillConfig(gamma=1.0)
SPARSE = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
SHARED = (2, 3)  # the layers that reuse keys, one with a sliding window


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "global_head_dim": 32}
    inputs = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": len(SHARED), "sliding_window": WINDOW}
    kinds = ["sliding_attention", "full_attention"] * 2
    more: dict[str, Any] = {"layer_types": kinds, "eos_token_id": None, "attn_implementation": "sdpa"}
    config = Gemma4TextConfig(**sizes, **heads, **inputs, **layers, **more)
    model = Gemma4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(1.5)  # attention that is peaked enough to leave blocks out
    return model


def mask_of(padded: bool, length: int = LENGTH) -> Tensor:
    starts = torch.tensor([0, PADDING if padded else 0])
    return (torch.arange(length) >= starts[:, None]).long()


def logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(prompt(2, LENGTH), **arguments).logits


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("last", [2, 127, 300])
def test_any_number_of_last_queries(model: PreTrainedModel, last: int, padded: bool) -> None:
    """With every block kept the model computes what SDPA does, with fewer it computes something else."""
    arguments = {"attention_mask": mask_of(padded), "logits_to_keep": last}
    expected = logits(model, **arguments)
    assert expected.shape[1] == (last or LENGTH)
    real = mask_of(padded)[:, -last:].bool()
    with enable_sparse_prefill(model, EVERYTHING):
        found = logits(model, **arguments)
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    with enable_sparse_prefill(model, SPARSE, statistics="density") as sparse:
        different = logits(model, **arguments)
    with recorded_layers(model) as calls:
        logits(model, **arguments)
    seen = calls[3][0].shape[2]  # before transformers 5.24 or so every layer saw all queries
    assert seen in (last or LENGTH, LENGTH)
    full = {1, 3} if seen >= 128 else {1}
    assert set(sparse.statistics) == full, "layers with enough queries run sparse"
    assert all(layer.density.max() < 0.9 for layer in sparse.statistics.values())
    assert (different - expected)[real].abs().max() > 0.01


@pytest.mark.parametrize("length", [50, LENGTH])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_generate(model: Any, length: int, cache: str | None, padded: bool) -> None:
    mask = mask_of(padded)[:, LENGTH - length :] if length == LENGTH else mask_of(False, length)
    if padded and length < LENGTH:
        mask[1, :20] = 0
    arguments = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    arguments |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    expected = torch.stack(model.generate(prompt(2, length), **arguments).logits)
    with enable_sparse_prefill(model, EVERYTHING):
        found = torch.stack(model.generate(prompt(2, length), **arguments).logits)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with enable_sparse_prefill(model, SPARSE):
        different = torch.stack(model.generate(prompt(2, length), **arguments).logits)
    assert ((different - expected).abs().max() > 0.01) == (length == LENGTH)


def test_short_prompts_keep_the_causal_rule(model: Any) -> None:
    """A prompt that SDPA would take without a mask: the last two queries alone must not look like the first two."""
    for length, cache in ((50, None), (50, 200)):
        with torch.no_grad():
            arguments: dict[str, Any] = {"logits_to_keep": 2}
            expected = model(prompt(2, length)).logits[:, -2:]
            if cache is not None:
                arguments["past_key_values"] = StaticCache(config=model.config, max_cache_len=cache)
            with enable_sparse_prefill(model, SPARSE):
                found = model(prompt(2, length), **arguments).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_packed_sequences(model: Any) -> None:
    positions = torch.cat((torch.arange(300), torch.arange(LENGTH - 300)))[None]
    for last in (0, 2, 200):
        arguments = {"position_ids": positions, "use_cache": False, "logits_to_keep": last}
        expected = logits(model, **{**arguments, "logits_to_keep": 0})[:, -last:]
        with enable_sparse_prefill(model, EVERYTHING):
            found = logits(model, **arguments)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        whole = logits(model, use_cache=False)[:, -last:]
        assert (found - whole).abs().max() > 0.01, "not packed"
