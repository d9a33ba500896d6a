"""Tiny models of many families: sparse prefill that keeps everything equals the model's own dense attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, has_full_attention
from hf_models import attention_function
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

from flexprefill_fa import FlexPrefillConfig, select_blocks
from flexprefill_fa.dense import attention_with_extras
from flexprefill_fa.integrations.transformers import SparsePrefill, describe_sparse_prefill, enable_sparse_prefill

EVERYTHING = FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64)
SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1, block_size=64)
TOLERANCE = 2e-4  # relative L2, fp32
LENGTH, PADDING, CHUNK = 300, 77, 150
FEW = ("llama", "gemma2", "gpt_oss", "mistral")
# Where padding and a cached prefix are tried too: the families that differ in what their attention hands over.
SOME = (*FEW, "glm", "glm4", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "olmo2", "qwen2_5_vl", "deepseek_v3")


@cache
def family(name: str) -> PreTrainedModel:
    """One model of each family for all tests; they leave it as they found it."""
    return FAMILIES[name]()


def prompt(batch: int, *, length: int = LENGTH, repeats: bool = False) -> Tensor:
    """Random token ids `[B, n]`, without padding (0) or tokens that mean images; or a phrase over and over."""
    ids = torch.randint(1, 120, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids[:, torch.arange(length) % 37] if repeats else ids


@contextmanager
def everything(model: PreTrainedModel) -> Iterator[SparsePrefill]:
    """Sparse prefill that keeps all blocks; the model's own attention again afterwards."""
    with enable_sparse_prefill(model, EVERYTHING, min_prompt_tokens=1) as handle:
        yield handle
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    return model(ids, **arguments).logits


@torch.no_grad()
def second_chunk(model: PreTrainedModel, ids: Tensor, chunk: int, mask: Tensor | None = None) -> Tensor:
    """Logits of the last `chunk` tokens, after the others have gone into a cache."""
    past, first = DynamicCache(config=model.config), ids.shape[1] - chunk
    model(ids[:, :first], past_key_values=past, attention_mask=None if mask is None else mask[:, :first])
    return model(ids[:, first:], past_key_values=past, attention_mask=mask).logits


def generate(model: PreTrainedModel, ids: Tensor, *, tokens: int = 4, **options: Any) -> list[list[int]]:
    """The tokens that greedy (or beam) search appends to each row."""
    before = copy.deepcopy(model.generation_config)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **options}
    options = {"attention_mask": torch.ones_like(ids), **options}
    out = model.generate(ids, **options)  # type: ignore[operator]
    model.generation_config = before  # some options stay set on it
    return out[:, ids.shape[1] :].tolist()


def error(actual: Tensor, expected: Tensor, real: Tensor | None = None) -> float:
    """Relative L2 error of the logits, over real tokens only where there is padding."""
    if real is not None:
        actual, expected = actual[real], expected[real]
    assert expected.isfinite().all()
    return float((actual - expected).norm() / expected.norm())


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Two prompts and their attention mask; the second has padding on one side."""
    ids, mask = prompt(2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(0, PADDING) if side == "left" else slice(-PADDING, None)] = 0
    return ids * mask, mask


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return family(request.param)


@pytest.fixture(params=SOME)
def one_of_some(request: pytest.FixtureRequest) -> PreTrainedModel:
    return family(request.param)


@pytest.fixture(params=FEW)
def one_of_few(request: pytest.FixtureRequest) -> PreTrainedModel:
    return family(request.param)


def test_a_prompt(model: PreTrainedModel) -> None:
    expected = logits(model, prompt(1))
    with everything(model):
        actual = logits(model, prompt(1))
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(one_of_some: PreTrainedModel, side: str) -> None:
    ids, mask = padded(side)
    expected = logits(one_of_some, ids, attention_mask=mask)
    with everything(one_of_some):
        actual = logits(one_of_some, ids, attention_mask=mask)
    assert error(actual, expected, mask.bool()) < TOLERANCE


def test_a_chunk_after_a_cached_prefix(one_of_some: PreTrainedModel) -> None:
    expected = second_chunk(one_of_some, prompt(1), CHUNK)
    with everything(one_of_some):
        actual = second_chunk(one_of_some, prompt(1), CHUNK)
    assert error(actual, expected) < TOLERANCE


def by_kept_blocks(
    sparse_layers: set[int], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> Any:
    """Dense attention by the model's own mask, and by the blocks that the selector keeps where the layer is sparse."""
    if module.layer_idx in sparse_layers:
        kept = select_blocks(query, key, SPARSE, scale=kwargs["scaling"]).to_dense()
        size, (rows, columns) = SPARSE.block_size, (query.shape[2], key.shape[2])
        kept = kept.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :rows, :columns]
        mask = mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, torch.finfo(mask.dtype).min)
    extras = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    out = attention_with_extras(query.double(), key.double(), value.double(), mask, kwargs["scaling"], **extras)
    return out.to(query.dtype).transpose(1, 2), None


def test_sparse_is_dense_over_the_kept_blocks(model: PreTrainedModel) -> None:
    """And not dense over all of them: otherwise the other tests would pass with dense attention in place of sparse."""
    if not has_full_attention(model):
        pytest.skip("all its layers attend to a window")
    dense = logits(model, prompt(1))
    with enable_sparse_prefill(model, SPARSE, min_prompt_tokens=1):
        found = [layer for layer in describe_sparse_prefill(model) if layer.runs == "sparse"]
        layers = {layer.layer for layer in found if layer.layer is not None}
        actual = logits(model, prompt(1))
    with attention_function(model, partial(by_kept_blocks, layers), eager_mask):
        expected = logits(model, prompt(1))
    assert error(actual, expected) < TOLERANCE
    if not layers:
        assert model.config.model_type == "gpt_oss", "sinks are dense on the CPU, nothing else is"
        return
    assert error(actual, dense) > 1e-3


def test_a_chunk_after_a_left_padded_prefix(one_of_few: PreTrainedModel) -> None:
    ids, mask = padded("left")
    expected = second_chunk(one_of_few, ids, CHUNK, mask)
    with everything(one_of_few):
        actual = second_chunk(one_of_few, ids, CHUNK, mask)
    assert error(actual, expected) < TOLERANCE


def test_packed_sequences(one_of_few: PreTrainedModel) -> None:
    """Sequences side by side in one row, told apart by their position ids, do not see each other."""
    ids = prompt(1)
    position_ids = torch.cat((torch.arange(130), torch.arange(LENGTH - 130)))[None]
    arguments = {"position_ids": position_ids, "use_cache": False}
    expected = logits(one_of_few, ids, **arguments)
    if one_of_few.config.model_type != "gpt_oss":  # which does not tell its masks of position ids
        alone = torch.cat([logits(one_of_few, part, use_cache=False) for part in (ids[:, :130], ids[:, 130:])], 1)
        assert error(expected, alone) < TOLERANCE
    with everything(one_of_few):
        actual = logits(one_of_few, ids, **arguments)
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("cache", [None, "static"])
def test_chunks_of_a_batch_of_unequal_prompts(one_of_few: PreTrainedModel, cache: str | None) -> None:
    """One row's first chunk is all padding."""
    ids, mask = prompt(2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :200] = 0
    ids = ids * mask
    options = {"attention_mask": mask, "prefill_chunk_size": 150}
    expected = generate(one_of_few, ids, **options)
    if cache:
        options["cache_implementation"] = cache
    with everything(one_of_few):
        assert generate(one_of_few, ids, **options) == expected


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Phimoe", {"num_local_experts": 4, "sliding_window": 96}),
        (
            "Qwen2Moe",
            {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
            | {"use_sliding_window": True, "sliding_window": 96, "layer_types": ["sliding_attention"] * 2},
        ),
    ],
)
def test_windows_that_only_the_mask_knows(name: str, fields: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 2048, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **fields)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    expected = logits(model, prompt(1))
    for chosen in (EVERYTHING, SPARSE):  # a window's blocks are not left to a selector
        with enable_sparse_prefill(model, chosen, min_prompt_tokens=1):
            assert {layer.runs for layer in describe_sparse_prefill(model)} == {"window"}
            assert error(logits(model, prompt(1)), expected) < TOLERANCE
    model.set_attn_implementation("flexprefill")
    with pytest.raises(ValueError, match=r"does not say how long its sliding window is: call enable_sparse_prefill"):
        logits(model, prompt(1))


@pytest.mark.parametrize("window", [96, 1024])
def test_window_layers_are_exact(window: int) -> None:
    """A window's blocks are all computed, also where the window is longer than the prompt."""
    model = copy.deepcopy(family("mistral"))
    model.config.sliding_window = window
    expected = logits(model, prompt(1))
    with enable_sparse_prefill(model, SPARSE, min_prompt_tokens=1, statistics="density") as handle:
        assert error(logits(model, prompt(1)), expected) < TOLERANCE
    assert handle.statistics == {}


class NoStream:
    """Stands in for a stream: transformers asks CUDA for one to offload a cache with, on the CPU too."""

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


GENERATE: dict[str, dict[str, Any]] = {
    "plain": {},
    "static-cache": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 160},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3, "tokens": 8},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("options", list(GENERATE.values()), ids=list(GENERATE))
def test_generate(one_of_few: PreTrainedModel, options: dict[str, Any]) -> None:
    ids = prompt(1, repeats="prompt_lookup_num_tokens" in options)
    expected = generate(one_of_few, ids, **options)
    with everything(one_of_few):
        actual = generate(one_of_few, ids, **options)
    assert actual == expected


def test_generate_with_an_offloaded_cache(one_of_few: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    expected = generate(one_of_few, prompt(1), cache_implementation="offloaded")
    assert expected == generate(one_of_few, prompt(1))
    with everything(one_of_few):
        actual = generate(one_of_few, prompt(1), cache_implementation="offloaded")
    assert actual == expected
