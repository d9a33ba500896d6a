"""Tiny random models of several parts, each with a prompt that has an image (or sound) in it, and one of text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

IMAGE = 120  # the token that stands for a piece of an image
LENGTH = 400
_TEXT: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
_PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_PIXELS = (3, 28, 28)


@dataclass(frozen=True)
class Composite:
    """A model and what it is asked.

    Attributes:
        model: in fp32, with sharp attention in its language layers.
        prompt: the arguments of a forward pass with an image in the prompt.
        text: of one without.
        tower: the part that sees the image, by name.
    """

    model: PreTrainedModel
    prompt: dict[str, Any]
    text: dict[str, Any]
    tower: str


def _composite(name: str, sizes: dict[str, Any], tokens: int, tower: str, **inputs: Tensor) -> Composite:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    language = model.get_decoder()
    with torch.no_grad():
        for weight, parameter in language.named_parameters():
            if weight.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
            elif weight.endswith(("q_norm.weight", "k_norm.weight")):  # gemma 3 multiplies by 1 + weight
                parameter.fill_(1.5)
    text = torch.randint(2, 100, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    ids = text.clone()
    ids[0, 50 : 50 + tokens] = IMAGE
    return Composite(model, {"input_ids": ids, **inputs}, {"input_ids": text}, tower)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _qwen(name: str, vision: dict[str, Any]) -> Composite:
    text = {**_TEXT, "rope_parameters": {**_PLAIN_ROPE, "mrope_section": [2, 3, 3]}}
    special = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    inputs = {"pixel_values": _random(64, 2 * 3 * 14 * 14), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    types = torch.zeros(1, LENGTH, dtype=torch.long)
    types[0, 50:66] = 1
    sizes = {"text_config": text, "vision_config": vision, **special}
    return _composite(name, sizes, 16, "model.visual", **inputs, mm_token_type_ids=types)


def _gemma3() -> Composite:
    """Its image tokens see themselves both ways; its processor tells them by token types, of text alone too."""
    text = {**_TEXT, "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}
    special = {"image_token_index": IMAGE, "boi_token_index": 121, "eoi_token_index": 122, "mm_tokens_per_image": 4}
    types = torch.zeros(1, LENGTH, dtype=torch.long)
    sizes = {"text_config": {**text, "query_pre_attn_scalar": 16}, "vision_config": _VISION, **special}
    made = _composite("Gemma3", sizes, 4, "model.vision_tower", pixel_values=_random(1, *_PIXELS))
    made.text["token_type_ids"] = types
    made.prompt["token_type_ids"] = (made.prompt["input_ids"] == IMAGE).long()
    return made


def _llava() -> Composite:
    sizes = {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 32},
        **{"image_token_index": IMAGE, "image_seq_length": 4},
    }
    return _composite("Llava", sizes, 4, "model.vision_tower", pixel_values=_random(1, *_PIXELS))


def _mistral3() -> Composite:
    sizes = {
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 16},
        **{"image_token_index": IMAGE, "spatial_merge_size": 1, "vision_feature_layer": -1},
    }
    inputs = {"pixel_values": _random(1, *_PIXELS), "image_sizes": torch.tensor([[28, 28]])}
    return _composite("Mistral3", sizes, 4, "model.vision_tower", **inputs)


def _smolvlm() -> Composite:
    sizes = {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION}
    sizes |= {"image_token_id": IMAGE, "scale_factor": 1}
    return _composite("SmolVLM", sizes, 4, "model.vision_model", pixel_values=_random(1, 1, *_PIXELS))


def _internvl() -> Composite:
    sizes = {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        **{"image_token_id": IMAGE, "image_seq_length": 1, "downsample_ratio": 0.5},
    }
    return _composite("InternVL", sizes, 1, "model.vision_tower", pixel_values=_random(1, *_PIXELS))


def _qwen2_audio() -> Composite:
    audio = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    sizes = {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "audio_config": {**audio, "d_model": 32, "max_source_positions": 20},
        "audio_token_index": IMAGE,
    }
    inputs = {"input_features": _random(1, 16, 40), "feature_attention_mask": torch.ones(1, 40, dtype=torch.long)}
    whole = torch.ones(1, LENGTH, dtype=torch.long)
    return _composite("Qwen2Audio", sizes, 10, "model.audio_tower", **inputs, attention_mask=whole)


def _mllama() -> Composite:
    """Layer 1 attends to the image and not to the text."""
    text = {**_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": _PLAIN_ROPE}
    del text["head_dim"]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    inputs = {
        "pixel_values": _random(1, 1, 1, *_PIXELS),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, LENGTH, 1, 1, dtype=torch.long),
    }
    sizes = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE}
    made = _composite("Mllama", sizes, 1, "model.vision_model", **inputs)
    with torch.no_grad():  # which start closed
        for name, parameter in made.model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(1.0)
    return made


COMPOSITES: dict[str, Callable[[], Composite]] = {
    "qwen2_vl": lambda: _qwen(
        "Qwen2VL", {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 1}
    ),
    "qwen2_5_vl": lambda: _qwen(
        "Qwen2_5_VL", {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    ),
    "gemma3": _gemma3,
    "llava": _llava,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "qwen2_audio": _qwen2_audio,
    "mllama": _mllama,
}
