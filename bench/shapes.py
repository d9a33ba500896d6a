"""Shapes of published models, by name: benchmarks build them with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexprefill_fa.tools.loading import UsageError, first_line, require_transformers
from flexprefill_fa.validation import MAX_HEAD_DIM, MIN_HEAD_DIM

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

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LEAST = {**dict.fromkeys(_SIZES, 1), "vocab_size": FIRST_TOKEN + 1}
_OTHER_WEIGHTS = 0.05  # share of the parameters that may be biases and norms of heads


def model_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The transformers config of a shape, or of a folder with a config.json.

    Args:
        name: one of `SHAPES`, or the folder.
        layers: of the model, None for the shape's own.

    Raises:
        UsageError: for a name that is neither, or a config of anything but a decoder whose every layer is attention to
            the whole prompt and a gated feed-forward part; before a model is built.
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
    if problem := _size_problem(config):
        raise UsageError(f"the config {name} must be of a dense decoder: {problem}")
    if layers is not None:
        if layers > config.num_hidden_layers:
            raise UsageError(f"layers must be at most the {config.num_hidden_layers} of {name}, got {layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):  # transformers checks that there is one for each layer
            config.layer_types = config.layer_types[:layers]
    if problem := _layer_problem(config):
        raise UsageError(f"cannot use the config {name}: {problem}")
    return config


def _size_problem(config: Any) -> str | None:
    """What is wrong with its numbers, in one line."""
    if config.is_encoder_decoder:
        return "it is of an encoder-decoder"
    if experts := [field for field in _EXPERTS if getattr(config, field, None)]:
        return f"it is of a mixture of experts ({experts[0]})"
    if missing := [field for field in _LEAST if not isinstance(getattr(config, field, None), int)]:
        return f"it has no {', '.join(missing)}"
    for field, least in _LEAST.items():
        if getattr(config, field) < least:
            return f"its {field} must be at least {least}, got {getattr(config, field)}"
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    if heads % kv_heads:
        return f"its query heads must be a multiple of its kv heads, got {heads} and {kv_heads}"
    if dim % 2 or not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        return f"its head_dim must be an even number in [{MIN_HEAD_DIM}, {MAX_HEAD_DIM}], got {dim}"
    return None


def _layer_problem(config: PretrainedConfig) -> str | None:
    """What is wrong with the model, built without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from flexprefill_fa.integrations.hf_plan import WHOLE_PROMPT
    from flexprefill_fa.integrations.transformers import describe_sparse_prefill

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        layers = describe_sparse_prefill(model)
    except Exception as error:  # depends on what is wrong with it
        return first_line(error)
    for layer in layers:
        if layer.runs != "sparse" or layer.why != WHOLE_PROMPT:
            return f"every layer must attend to the whole prompt and nothing else, layer {layer.layer}: {layer.why}"
    if len(layers) != config.num_hidden_layers:
        return f"every layer must be attention, got {len(layers)} of {config.num_hidden_layers}"
    found, expected = model.num_parameters(), parameter_count(config)
    if abs(found - expected) > _OTHER_WEIGHTS * expected:
        return (
            f"its layers must be attention and a gated feed-forward part alone: expected about {expected:,} parameters "
            f"for its sizes, got {found:,}"
        )
    return None


def parameter_count(config: Any) -> int:
    """Of a decoder whose layers are attention and a gated feed-forward part, norms included, biases not."""
    hidden = config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = 3 * hidden * config.intermediate_size + 2 * hidden * head_dim(config) * heads + 2 * hidden
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + hidden + tables


def head_dim(config: Any) -> int:
    """Of each attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
