"""Models of several parts: the language layers are switched, and every other part keeps the attention that it has."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import torch
from composite_models import COMPOSITES, LENGTH, Composite
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, or_masks

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.hf_mask import PromptMask, flexprefill_mask
from flexprefill_fa.integrations.transformers import (
    NAME,
    compile_prefill,
    describe_sparse_prefill,
    enable_sparse_prefill,
)

EVERYTHING = FlexPrefillConfig(gamma=1.0, min_budget=1)
SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1)
TOLERANCE = 1e-5  # relative L2, fp32


@cache
def composite(name: str) -> Composite:
    """One of each for all tests; they leave it as they found it."""
    return COMPOSITES[name]()


@pytest.fixture(params=list(COMPOSITES))
def made(request: pytest.FixtureRequest) -> Composite:
    return composite(request.param)


@torch.no_grad()
def logits(made: Composite, arguments: dict[str, Any]) -> Tensor:
    return made.model(**arguments).logits


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def implementations(model: nn.Module) -> dict[str, tuple[int, str | None]]:
    """By module: its config object, and what that one says."""
    configs = {name: vars(module).get("config") for name, module in model.named_modules()}
    return {
        name: (id(config), config._attn_implementation)
        for name, config in configs.items()
        if isinstance(config, PreTrainedConfig)
    }


def test_an_image_in_the_prompt(made: Composite) -> None:
    """What keeps everything is what the model does by itself; what leaves blocks out is not, unless it says so."""
    dense = logits(made, made.prompt)
    assert (
        error(logits(made, made.text | {k: v for k, v in made.prompt.items() if k == "attention_mask"}), dense) > 1e-3
    )
    before = implementations(made.model)
    with enable_sparse_prefill(made.model, EVERYTHING):
        assert error(logits(made, made.prompt), dense) < TOLERANCE
        assert error(logits(made, made.prompt | {"use_cache": False}), dense) < TOLERANCE
    with enable_sparse_prefill(made.model, SPARSE, statistics="density") as handle:
        sparse = logits(made, made.prompt)
    assert implementations(made.model) == before
    assert torch.equal(logits(made, made.prompt), dense)
    if made.model.config.model_type == "gemma3":
        assert handle.statistics == {} and error(sparse, dense) < TOLERANCE
    else:
        assert error(sparse, dense) > 0.01
        assert all((layer.density < 1).any() for layer in handle.statistics.values())


def test_text_alone_is_sparse(made: Composite, caplog: pytest.LogCaptureFixture) -> None:
    dense = logits(made, made.text)
    with caplog.at_level(logging.WARNING), enable_sparse_prefill(made.model, SPARSE, statistics="density") as handle:
        assert error(logits(made, made.text), dense) > 0.01
        sparse = [layer.layer for layer in describe_sparse_prefill(made.model) if layer.runs == "sparse"]
    assert sorted(handle.statistics) == sparse
    assert "runs dense" not in caplog.text
    with enable_sparse_prefill(made.model, EVERYTHING):
        assert error(logits(made, made.text), dense) < TOLERANCE


def test_what_is_switched_and_what_is_not(made: Composite) -> None:
    tower = made.model.get_submodule(made.tower)
    before, own = implementations(made.model), implementations(tower)
    with enable_sparse_prefill(made.model, SPARSE):
        described = describe_sparse_prefill(made.model)
        assert implementations(tower) == own
        switched = {name for name, (_, said) in implementations(made.model).items() if said == NAME}
        assert made.model.config.get_text_config()._attn_implementation == NAME
    layers = [layer for layer in described if layer.layer is not None]
    assert {layer.runs for layer in layers} <= {"sparse", "window"}
    count = sum(name.endswith(".self_attn") for name in switched)
    assert len(layers) == count == 2 and "" in switched
    parts = [part for part in described if part.layer is None]
    assert all(part.runs == "own" and part.why.endswith("keeps its own attention, 'sdpa'") for part in parts)
    assert any(part.why.startswith(f"{made.tower} ({type(tower).__name__})") for part in parts)
    assert implementations(made.model) == before


def test_cross_attention_keeps_its_own() -> None:
    made = composite("mllama")
    with enable_sparse_prefill(made.model, SPARSE):
        described = describe_sparse_prefill(made.model)
        assert made.model.model.language_model.layers[1].cross_attn.config._attn_implementation == "sdpa"
    assert [layer.layer for layer in described] == [0, 2, None, None]
    assert described[-1].why.startswith(
        "model.language_model.layers.* (MllamaCrossAttentionDecoderLayer) keeps its own"
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
@pytest.mark.parametrize("parts", [{"vision_config": "eager"}, {"": "sdpa", "text_config": "eager"}])
def test_parts_with_implementations_of_their_own(name: str, parts: dict[str, str]) -> None:
    made = COMPOSITES[name]()
    made.model.set_attn_implementation(parts)
    before, dense = implementations(made.model), logits(made, made.prompt)
    assert {said for _, said in before.values()} == {"sdpa", "eager"}
    tower = implementations(made.model.get_submodule(made.tower))
    with enable_sparse_prefill(made.model, EVERYTHING):
        assert implementations(made.model.get_submodule(made.tower)) == tower
        assert error(logits(made, made.prompt), dense) < TOLERANCE
        with enable_sparse_prefill(made.model.get_decoder(), EVERYTHING):
            assert error(logits(made, made.prompt), dense) < TOLERANCE
    assert implementations(made.model) == before
    assert torch.equal(logits(made, made.prompt), dense)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_by_name_the_other_parts_are_dense(name: str, caplog: pytest.LogCaptureFixture) -> None:
    made = COMPOSITES[name]()
    dense = logits(made, made.prompt)
    made.model.set_attn_implementation(NAME)
    before = implementations(made.model)
    with caplog.at_level(logging.WARNING):
        assert error(logits(made, made.prompt), dense) < TOLERANCE
    assert "Attention) runs dense: it is not causal" in caplog.text
    with enable_sparse_prefill(made.model, SPARSE):
        assert error(logits(made, made.text), logits(COMPOSITES[name](), made.text)) > 0.01
    assert implementations(made.model) == before


def test_blocks_that_see_themselves_are_dense_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    made = COMPOSITES["gemma3"]()
    with caplog.at_level(logging.WARNING), enable_sparse_prefill(made.model, SPARSE):
        logits(made, made.prompt)
    for layer in (0, 1):
        assert f"layer {layer} (Gemma3Attention) runs dense: it was given an attention mask that" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_masks_with_blocks(image: bool, packed: bool) -> None:
    """A union inside an intersection is one too; a union with nothing is none."""
    blocks = torch.full((1, LENGTH), -1)
    if image:
        blocks[0, 50:60] = 0
    mask = or_masks(causal_mask_function, blockwise_overlay(blocks))
    if packed:
        mask = and_masks(mask, lambda batch, head, query, key: (query >= 200) == (key >= 200))
    rows = torch.arange(LENGTH)
    expected = rows[:, None] >= rows
    if image:
        expected |= ((rows[:, None] >= 50) & (rows[:, None] < 60)) & ((rows >= 50) & (rows < 60))
    if packed:
        expected &= (rows[:, None] >= 200) == (rows >= 200)
    got = flexprefill_mask(1, LENGTH, LENGTH, mask_function=mask, device="cpu")
    if image or packed:
        assert torch.equal(got[0, 0], expected)
    else:
        assert PromptMask.of(got) == PromptMask()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_generate(name: str, cache: str | None) -> None:
    made = composite(name)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = made.model.generate(**made.prompt, **options)  # type: ignore[operator]
    with enable_sparse_prefill(made.model, EVERYTHING):
        actual = made.model.generate(**made.prompt, **options, cache_implementation=cache)  # type: ignore[operator]
    assert torch.equal(actual, expected) and actual.shape[1] == LENGTH + 4


def test_a_compiled_prefill_is_sparse() -> None:
    made = composite("llava")
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}

    def first_logits() -> Tensor:
        found = made.model.generate(  # type: ignore[operator]
            **made.text, **options, output_logits=True, return_dict_in_generate=True
        )
        return found.logits[0]

    dense = first_logits()
    with enable_sparse_prefill(made.model, SPARSE):
        sparse = first_logits()
        with compile_prefill(made.model):
            assert error(first_logits(), sparse) < 1e-4
    assert error(sparse, dense) > 0.01
