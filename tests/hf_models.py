"""Tiny random transformers models, and attention functions that record or imitate what a model's layers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle_attention import masked_attention
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flexprefill_fa import BlockSelection, FlexPrefillConfig, select_blocks

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
"""Sizes of a model of any family."""

FAMILIES: dict[str, tuple[type, type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_model(family: str, *, layers: int = 2, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of 4 query and 2 key heads of 32, whose attention is peaked enough to leave blocks out."""
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": layers}
    config = config_class(**{**sizes, **heads, "pad_token_id": 0, "attn_implementation": "sdpa", **overrides})
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)  # random weights of the usual size attend almost uniformly
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(2.5)
    return model


def prompt(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids `[B, n]`, none of them the padding token 0."""
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def attention_function(model: PreTrainedModel, function: Callable[..., Any], mask: Callable[..., Any] = sdpa_mask):
    """The model with another attention function, and sdpa again afterwards."""
    AttentionInterface.register("test_attention", function)
    AttentionMaskInterface.register("test_attention", mask)
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation("test_attention")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def recorded_layers(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The (query, key) of every dense attention call inside the context, in order."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        calls.append((query.clone(), key.clone()))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    with attention_function(model, record):
        yield calls


@contextmanager
def oracle_layers(
    model: PreTrainedModel,
    config: FlexPrefillConfig,
    starts: list[int] | None = None,
    lengths: list[int] | None = None,
) -> Iterator[list[BlockSelection]]:
    """Every attention call in fp64 over the blocks that the selector keeps for its query and key; the selections."""
    selections: list[BlockSelection] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        scale = kwargs["scaling"]
        selection = select_blocks(query, key, config, starts=starts, lengths=lengths, scale=scale)
        selections.append(selection)
        out = masked_attention(
            query, key, value, selection.to_dense(), config.block_size, scale, starts=starts, lengths=lengths
        )
        return out.to(query.dtype).transpose(1, 2), None

    with attention_function(model, attend):
        yield selections


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What switching must leave as it was: the implementation, and what the modules carry."""
    return model.config._attn_implementation, [sorted(vars(module)) for module in model.modules()]


def run(model: PreTrainedModel, length: int = 400, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(prompt(1, length), **arguments)
