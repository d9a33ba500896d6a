"""The queries, keys and values that layers of the needle model see on a needle prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.tools.loading import load_model
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import build_prompt


def capture_layers(
    length: int, layers: Sequence[int], *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """query `[1, 8, n, 64]`, key and value `[1, 2, n, 64]` as each layer's attention gets them, positions applied.

    Layers count from 0; one pass of the model serves them all. `length` and `seed` are of the prompt.
    """
    from tokenizers import Tokenizer

    model, _ = load_model(MODEL_DIR, dtype, device)
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    decoder: Any = model.get_decoder()
    captured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def capturing(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            captured[module.layer_idx] = (query.contiguous(), key.contiguous(), value.contiguous())
        return sdpa_attention_forward(module, query, key, value, *arguments, **options)

    prompt = build_prompt(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")), length, needles=8, seed=seed)
    AttentionInterface.register("capturing", capturing)
    model.set_attn_implementation("capturing")
    decoder.layers = decoder.layers[: max(layers) + 1]  # the layers above it are not needed
    with torch.no_grad():
        decoder(torch.tensor([prompt.token_ids], device=device), use_cache=False)
    return captured
