"""Tiny random models with sparse prefill: gamma = 1 equals sdpa, less equals an oracle over the same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, oracle_layers, prompt, tiny_model
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import NAME, compile_prefill, enable_sparse_prefill

EVERYTHING = FlexPrefillConfig(gamma=1.0, min_budget=1)
SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1)
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}
LENGTH = 420


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def padded(ids: Tensor, starts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(ids, attention_mask) with the padding token wherever a row is not real."""
    position = torch.arange(ids.shape[1])
    start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    mask = (position >= start) & (position < start + length)
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("padding", [None, ([0, 131], [LENGTH, LENGTH - 131]), ([0, 0], [LENGTH, 300])])
def test_gamma_one_equals_sdpa(model: PreTrainedModel, padding: tuple[list[int], list[int]] | None) -> None:
    ids = prompt(2, LENGTH)
    arguments: dict[str, Any] = {}
    real = torch.ones_like(ids).bool()
    if padding is not None:
        ids, arguments["attention_mask"] = padded(ids, *padding)
        real = arguments["attention_mask"].bool()
    expected = logits(model, ids, **arguments)
    with enable_sparse_prefill(model, EVERYTHING, statistics="density") as sparse:
        actual = logits(model, ids, **arguments)
    assert sorted(sparse.statistics) == [0, 1], "both layers ran through the selector"
    assert all((layer.density == 1).all() for layer in sparse.statistics.values())
    torch.testing.assert_close(actual[real], expected[real], **CLOSE)


@pytest.mark.parametrize("padding", [None, ([0, 131], [LENGTH, LENGTH - 131])])
def test_sparse_equals_an_oracle_over_the_same_blocks(
    model: PreTrainedModel, padding: tuple[list[int], list[int]] | None
) -> None:
    ids = prompt(2, LENGTH)
    arguments: dict[str, Any] = {}
    real = torch.ones_like(ids).bool()
    if padding is not None:
        ids, arguments["attention_mask"] = padded(ids, *padding)
        real = arguments["attention_mask"].bool()
    dense = logits(model, ids, **arguments)
    with oracle_layers(model, SPARSE, *(padding or (None, None))) as selections:
        expected = logits(model, ids, **arguments)
    with enable_sparse_prefill(model, SPARSE, statistics="density") as sparse:
        actual = logits(model, ids, **arguments)
    torch.testing.assert_close(actual[real], expected[real], **CLOSE)
    assert (actual - dense)[real].abs().max() > 0.01, "dense would pass too"
    for layer, selection in zip(sparse.statistics.values(), selections, strict=True):
        assert torch.equal(layer.kept_blocks, selection.kept_blocks())
        torch.testing.assert_close(layer.density, selection.density())
        torch.testing.assert_close(layer.js_distance, selection.js_distance, atol=1e-4, rtol=0, equal_nan=True)
        assert layer.density.min() < 1 and layer.recall is None


@pytest.mark.parametrize("first", [260, 301])
def test_a_second_turn_after_a_cached_prefix(llama: PreTrainedModel, first: int) -> None:
    ids = prompt(2, 600)
    expected = logits(llama, ids)[:, first:]
    with enable_sparse_prefill(llama, EVERYTHING, statistics="density") as sparse:
        cache = DynamicCache(config=llama.config)
        logits(llama, ids[:, :first], past_key_values=cache)
        actual = logits(llama, ids[:, first:], past_key_values=cache)
        blocks = sum(-(-(first + min(600 - first, 128 * row + 128)) // 128) for row in range(-(-(600 - first) // 128)))
        assert all((layer.kept_blocks == blocks).all() for layer in sparse.statistics.values())
    torch.testing.assert_close(actual, expected, **CLOSE)

    with enable_sparse_prefill(llama, SPARSE, statistics="density") as sparse:
        cache = DynamicCache(config=llama.config)
        logits(llama, ids[:, :first], past_key_values=cache)
        actual = logits(llama, ids[:, first:], past_key_values=cache)
    assert all((layer.density < 1).any() for layer in sparse.statistics.values())
    assert (actual - expected).abs().max() > 0.01


def test_a_second_turn_with_left_padding(llama: PreTrainedModel) -> None:
    ids, mask = padded(prompt(2, 600), [0, 77], [600, 523])
    expected = logits(llama, ids, attention_mask=mask)
    with enable_sparse_prefill(llama, EVERYTHING):
        cache = DynamicCache(config=llama.config)
        logits(llama, ids[:, :301], attention_mask=mask[:, :301], past_key_values=cache)
        actual = logits(llama, ids[:, 301:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(actual, expected[:, 301:], **CLOSE)


@pytest.mark.parametrize("chunk", [2, 40, 127])
def test_a_few_tokens_after_a_long_prefix_are_dense(llama: PreTrainedModel, chunk: int) -> None:
    """A verification chunk or a short second turn, of a padded batch."""
    ids, mask = padded(prompt(2, 500), [0, 77], [500, 423])
    expected = logits(llama, ids, attention_mask=mask)[:, -chunk:]
    with enable_sparse_prefill(llama, EVERYTHING, statistics="density") as sparse:
        cache = DynamicCache(config=llama.config)
        logits(llama, ids[:, :-chunk], attention_mask=mask[:, :-chunk], past_key_values=cache)
        blocks = [layer.kept_blocks.clone() for layer in sparse.statistics.values()]
        actual = logits(llama, ids[:, -chunk:], attention_mask=mask, past_key_values=cache)
        for layer, before in zip(sparse.statistics.values(), blocks, strict=True):
            assert torch.equal(layer.kept_blocks, before), "the selector ran again"
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("min_prompt_tokens", [1, 10_000])
def test_packed_sequences(llama: PreTrainedModel, min_prompt_tokens: int) -> None:
    """Sequences side by side in one row, told apart by their position ids, do not see each other."""
    ids = prompt(2, LENGTH)
    position_ids = torch.cat((torch.arange(150), torch.arange(LENGTH - 150)))[None]
    arguments = {"position_ids": position_ids, "use_cache": False}
    expected = logits(llama, ids, **arguments)
    assert (expected - logits(llama, ids, use_cache=False)).abs().max() > 0.01
    with enable_sparse_prefill(llama, EVERYTHING, min_prompt_tokens=min_prompt_tokens, statistics="density") as sparse:
        actual = logits(llama, ids, **arguments)
    assert len(sparse.statistics) == (2 if min_prompt_tokens == 1 else 0)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_generate_with_left_padding(model: PreTrainedModel) -> None:
    """Greedy tokens of a padded batch: gamma = 1 as dense; sparse as each row alone (padding of whole blocks)."""
    ids, mask = padded(prompt(2, LENGTH), [0, 128], [LENGTH, LENGTH - 128])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def generate(ids: Tensor, mask: Tensor | None) -> Tensor:
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]  # type: ignore[operator, index]

    dense, dense_logits = generate(ids, mask), logits(model, ids, attention_mask=mask)
    with enable_sparse_prefill(model, EVERYTHING, statistics="density") as sparse:
        assert torch.equal(generate(ids, mask), dense)
        assert len(sparse.statistics) == 2
    with enable_sparse_prefill(model, SPARSE, statistics="density") as sparse:
        together = generate(ids, mask)
        assert (logits(model, ids, attention_mask=mask) - dense_logits)[mask.bool()].abs().max() > 0.01
        assert all((layer.density < 1).any() for layer in sparse.statistics.values())
        for row, start in enumerate((0, 128)):
            twice = ids[row, start:].expand(2, -1)
            assert torch.equal(generate(twice, None), together[row].expand(2, -1))


def test_short_prompts_and_decode_steps_are_dense(llama: PreTrainedModel) -> None:
    for length in (1, 100, 130, 256):
        ids, mask = padded(prompt(2, length), [0, length // 3], [length, length - length // 3])
        expected = logits(llama, ids, attention_mask=mask)
        with enable_sparse_prefill(llama, SPARSE, statistics="density") as sparse:
            actual = logits(llama, ids, attention_mask=mask)
        assert sparse.statistics == {}
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)


def test_a_model_spread_by_a_device_map(llama: PreTrainedModel, tmp_path: Path) -> None:
    """The second layer on the disk: the same hooks as for a second GPU, which bring every input to its layer."""
    pytest.importorskip("accelerate")
    llama.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    spread: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert spread.model.layers[1].self_attn.q_proj.weight.is_meta
    ids, mask = padded(prompt(2, LENGTH), [0, 128], [LENGTH, LENGTH - 128])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = []
    models: tuple[Any, ...] = (llama, spread)
    for model in models:
        with enable_sparse_prefill(model, SPARSE, statistics="density") as sparse:
            tokens = model.generate(ids, **options)
            found.append((tokens, logits(model, ids, attention_mask=mask), sparse.statistics))
    (tokens, expected, statistics), (same_tokens, actual, same_statistics) = found
    assert torch.equal(same_tokens, tokens)
    torch.testing.assert_close(actual, expected, **CLOSE)
    for layer in (0, 1):
        assert torch.equal(same_statistics[layer].kept_blocks, statistics[layer].kept_blocks)
        assert same_statistics[layer].density.mean() < 0.9
    message = "expected a model on one device or shared out by tp_plan, got one spread by device_map over cpu, disk"
    with enable_sparse_prefill(spread, SPARSE), pytest.raises(ValueError, match=message):
        compile_prefill(spread)


def test_registered_under_a_name_that_transformers_does_not_rewrite() -> None:
    assert NAME in AttentionInterface().valid_keys()
    assert not any(part in NAME for part in ("flash", "sdpa", "/"))
