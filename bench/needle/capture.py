"""The queries, keys and values that one layer of the needle model sees on a needle prompt."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from bench.needle import MODEL_DIR
from bench.needle.prompts import build_prompt
from flexprefill_fa.loading import load_model

_NEEDLES = 8


def model_config() -> dict[str, Any]:
    """The needle model's config.json: numbers of layers and heads, head_dim."""
    return json.loads((MODEL_DIR / "config.json").read_text())


def capture(
    length: int, layer: int, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query `[1, 8, n, 64]`, key and value `[1, 2, n, 64]` as the layer's attention gets them, positions applied.

    Args:
        length: tokens of the prompt.
        layer: which layer, from 0.
        dtype, device: of the model and the result.
        seed: of the prompt.

    Raises:
        ValueError: for a layer that the model does not have, or a prompt that cannot be built.
        UsageError: without transformers.
    """
    from tokenizers import Tokenizer

    model, _ = load_model(MODEL_DIR, dtype, device)
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    decoder: Any = model.get_decoder()
    if not 0 <= layer < len(decoder.layers):
        raise ValueError(f"layer must be in [0, {len(decoder.layers)}), got {layer}")
    captured: list[tuple[Tensor, Tensor, Tensor]] = []

    def capturing(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        if module.layer_idx == layer:
            captured.append((query.contiguous(), key.contiguous(), value.contiguous()))
        return sdpa_attention_forward(module, query, key, value, *arguments, **options)

    prompt = build_prompt(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")), length, needles=_NEEDLES, seed=seed)
    AttentionInterface.register("capturing", capturing)
    model.set_attn_implementation("capturing")
    decoder.layers = decoder.layers[: layer + 1]  # the layers above it are not needed
    with torch.no_grad():
        decoder(torch.tensor([prompt.token_ids], device=device), use_cache=False)
    return captured[0]
