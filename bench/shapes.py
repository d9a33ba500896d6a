"""Shapes of published models, by name: benchmarks build them with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexprefill_fa.tools.loading import UsageError, require_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 135168},
    **{"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False},
    **{"bos_token_id": 128000, "eos_token_id": 128001},
}
_QWEN3 = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 12288},
    **{"num_hidden_layers": 36, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06},
    **{"rope_theta": 1000000.0, "bos_token_id": 151643, "eos_token_id": 151645},
}
_TINY = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072},
    **{"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA,
    "qwen3-8b": {**_LLAMA, **_QWEN3},
    "tiny": {**_LLAMA, **_TINY},
}
"""Hugging Face configs, without what the length of a prompt does not depend on; "tiny" is of no published model."""

FIRST_TOKEN = 3
"""Of random prompts; the ids below are special ones in most vocabularies."""


def model_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The transformers config of one of `SHAPES`, with its own number of layers or fewer."""
    require_transformers()
    from transformers import AutoConfig

    if name not in SHAPES:
        raise UsageError(f"config must be one of {', '.join(SHAPES)}, got {name!r}")
    fields = dict(SHAPES[name])
    if layers is not None:
        if layers > fields["num_hidden_layers"]:
            raise UsageError(f"layers must be at most the {fields['num_hidden_layers']} of {name}, got {layers}")
        fields["num_hidden_layers"] = layers
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
