"""Shapes of published models, by name: benchmarks build them with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexprefill_fa.loading import UsageError, first_line, require_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 135168,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "bfloat16",
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
}
"""Hugging Face configs, without what the length of a prompt does not depend on; "tiny" is of no published model."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def model_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The transformers config of a shape, or of a folder with a config.json.

    Args:
        name: one of `SHAPES`, or the folder.
        layers: of the model, None for the shape's own.

    Raises:
        UsageError: for a name that is neither, or a config that is no decoder of the usual form.
    """
    require_transformers()
    from transformers import AutoConfig

    if name in SHAPES:
        fields = dict(SHAPES[name])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    elif (Path(name) / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # depends on what is wrong in the file
            raise UsageError(f"cannot read the config in {name}: {first_line(error)}") from error
    else:
        raise UsageError(f"config must be one of {', '.join(SHAPES)} or a folder with a config.json, got {name!r}")
    if config.is_encoder_decoder:
        raise UsageError(f"the config {name} is of an encoder-decoder, expected a decoder")
    experts = [field for field in _EXPERTS if getattr(config, field, None)]
    if experts:
        raise UsageError(f"the config {name} is of a mixture of experts ({experts[0]}), expected a dense decoder")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    missing = [field for field in needed if not isinstance(getattr(config, field, None), int)]
    if missing:
        raise UsageError(f"the config {name} is not of a dense decoder: it has no {', '.join(missing)}")
    if layers is not None:
        if layers > config.num_hidden_layers:
            raise UsageError(f"layers must be at most the {config.num_hidden_layers} of {name}, got {layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):  # transformers checks that there is one for each layer
            config.layer_types = config.layer_types[:layers]
    return config


def head_dim(config: Any) -> int:
    """Of each attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
