"""Tiny random fp32 models of many transformers families, for tests that compare attention implementations.

All have 4 query heads of 16 (deepseek_v3: 32 for query and key, 16 for value), in most families over 2 key heads, a
vocabulary of 128 and no dropout. They run their own dense attention ("eager") when they are built. Windows and chunks
are of 96 tokens, so that they cut into prompts of a few hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

HEADS, KEY_HEADS, HEAD_DIM, WINDOW = 4, 2, 16, 96
QUERY_KEY_SCALE = 12.0  # random weights of the usual size attend almost uniformly
NORM_SCALE = 2.5  # of normalised queries and keys, which forget the scale of their weights
_QUERY_KEY = ("q_proj.weight", "k_proj.weight", "q_b_proj.weight")
_NORMS = (
    *("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight"),
    *("query_layernorm.weight", "key_layernorm.weight"),
)
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 2048,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generate stops at max_new_tokens alone
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": KEY_HEADS}
_HEAD_DIM: dict[str, Any] = {"head_dim": HEAD_DIM}
_SLIDING: dict[str, Any] = {"sliding_window": WINDOW}
_ALTERNATING: dict[str, Any] = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_PLAIN_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _sharpen(model: nn.Module) -> None:
    """Scale queries and keys in place until their attention is peaked."""
    for name, parameter in model.named_parameters():
        if name.endswith(_QUERY_KEY):
            parameter.mul_(QUERY_KEY_SCALE)
        elif name.endswith(_NORMS) and "gemma3" in type(model).__name__.lower():
            parameter.fill_(NORM_SCALE - 1)  # it multiplies by 1 + weight
        elif name.endswith(_NORMS):
            parameter.mul_(NORM_SCALE)
        elif name.endswith("qkv_proj.weight"):  # phi3: queries, keys, values
            parameter[: (HEADS + KEY_HEADS) * HEAD_DIM].mul_(QUERY_KEY_SCALE)
        elif name.endswith("query_key_value.weight"):  # gpt_neox: query, key, value of each head
            parameter.view(HEADS, 3, HEAD_DIM, -1)[:, :2].mul_(QUERY_KEY_SCALE)
        elif name.endswith("kv_b_proj.weight"):  # deepseek_v3: key and value of each head, from few dimensions
            parameter.mul_(2 * QUERY_KEY_SCALE)
        elif name.endswith("sinks"):  # gpt_oss
            parameter.normal_()


def _build(prefix: str, model_class: str, *parts: dict[str, Any], config_class: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {}
    for part in (_SIZES, *parts):
        sizes |= part
    config = getattr(transformers, config_class or f"{prefix}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{prefix}{model_class}")(config)
    with torch.no_grad():
        _sharpen(model)
    return model.float().eval()


def _causal(prefix: str, *parts: dict[str, Any], config_class: str | None = None) -> Callable[[], PreTrainedModel]:
    return partial(_build, prefix, "ForCausalLM", _GROUPED, *parts, config_class=config_class)


def _qwen2_5_vl() -> PreTrainedModel:
    """The whole model, with a vision tower of one layer that text never enters."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**_SIZES, **_GROUPED, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    special = {"image_token_id": 124, "video_token_id": 125, "vision_start_token_id": 126, "vision_end_token_id": 127}
    arguments: dict[str, Any] = {**special, "attn_implementation": "eager"}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **arguments)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        _sharpen(model.model.language_model)
    return model.float().eval()


_DEEPSEEK_V3: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
    "first_k_dense_replace": 1,
}
_LLAMA4: dict[str, Any] = {
    # Layer 0 attends in chunks and rotates, layer 1 attends to all and does not.
    **{
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    **{"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "use_qk_norm": True},
}
_JAMBA: dict[str, Any] = {
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **{"num_experts": 2, "mamba_d_state": 4, "mamba_expand": 1, "mamba_dt_rank": 4},
}
_BAMBA: dict[str, Any] = {
    **{"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    **{"mamba_expand": 1, "mamba_chunk_size": 64},
}

# use_cache: with its own dense attention, bamba's chunk after a cached prefix differs from the same tokens of the whole
# prompt (by 40 %; jamba's by 6e-5, the others' by less than 1e-6), so a chunk is only compared with the same chunk.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _causal("Llama", _HEAD_DIM),  # Yi too
    "glm": _causal("Glm", _HEAD_DIM),
    "glm4": _causal("Glm4", _HEAD_DIM),
    "qwen2": _causal("Qwen2"),  # Qwen2.5 too
    "qwen2_sliding": _causal("Qwen2", _ALTERNATING, {"use_sliding_window": True}),
    "qwen3": _causal("Qwen3", _HEAD_DIM),
    "qwen3_moe": _causal("Qwen3Moe", _HEAD_DIM, _EXPERTS, {"moe_intermediate_size": 32}),
    "qwen2_5_vl": _qwen2_5_vl,
    "mistral": _causal("Mistral", _HEAD_DIM, _SLIDING),
    "mixtral": _causal("Mixtral", _HEAD_DIM, _LOCAL_EXPERTS),
    # Scores are scaled by query_pre_attn_scalar ** -0.5, not by head_dim: 0.2, as granite's.
    "gemma2": _causal("Gemma2", _HEAD_DIM, _ALTERNATING, {"attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 25}),
    "gemma3_text": _causal(
        "Gemma3", _HEAD_DIM, _ALTERNATING, {"query_pre_attn_scalar": 25}, config_class="Gemma3TextConfig"
    ),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3", _SLIDING),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "olmoe": _causal("Olmoe", _EXPERTS),
    "gpt_oss": _causal("GptOss", _HEAD_DIM, _ALTERNATING, _LOCAL_EXPERTS, _PLAIN_ROPE),
    "gpt_neox": _causal("GPTNeoX"),  # as many key heads as query heads
    "cohere": _causal("Cohere"),
    "cohere2": _causal("Cohere2", _HEAD_DIM, _ALTERNATING),
    "granite": _causal("Granite", {"attention_multiplier": 0.2}),
    "starcoder2": _causal("Starcoder2", _SLIDING, {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "stablelm": _causal("StableLm"),
    "deepseek_v3": _causal("DeepseekV3", _DEEPSEEK_V3),
    "ernie4_5": _causal("Ernie4_5", _HEAD_DIM),
    "exaone4": _causal("Exaone4", _HEAD_DIM, _ALTERNATING),
    "smollm3": _causal("SmolLM3"),
    "seed_oss": _causal("SeedOss", _HEAD_DIM, {"residual_dropout": 0.0}),
    "nemotron": _causal("Nemotron", _HEAD_DIM),
    "helium": _causal("Helium", _HEAD_DIM),
    "hunyuan_v1_dense": _causal("HunYuanDenseV1", _HEAD_DIM),
    "arcee": _causal("Arcee", _HEAD_DIM),
    "apertus": _causal("Apertus", _PLAIN_ROPE),
    "llama4_text": _causal("Llama4", _HEAD_DIM, _LLAMA4, config_class="Llama4TextConfig"),
    "jamba": _causal("Jamba", _JAMBA),
    "bamba": _causal("Bamba", _BAMBA),
}


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether any layer attends to the whole prompt, so that a selector can leave blocks out of it."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return any(kind in ("full_attention", "attention") for kind in types)
    return getattr(config, "sliding_window", None) is None
