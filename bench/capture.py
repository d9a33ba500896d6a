"""The queries, keys and values that layers of a trained model see: of any model on a text, or on a needle prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workloads import Inputs
from flexprefill_fa.tools.fidelity.texts import CORPORA, Tokens, first_tokens
from flexprefill_fa.tools.loading import UsageError, load_model
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import build_prompt


def needle_layers(
    length: int, layers: Sequence[int], *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[int, Inputs]:
    """What layers of the packaged needle model see on the needle prompt of a length in tokens and a seed.

    Raises:
        UsageError: for a length that holds no such prompt.
    """
    model, tokenizer = load_model(MODEL_DIR, dtype, device)
    loaded: Any = tokenizer
    try:
        prompt = build_prompt(loaded.backend_tokenizer, length, needles=8, seed=seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return capture_layers(model, prompt.token_ids, layers)


def text_layer(
    folder: Path, text: str, length: int, layer: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, Tokens]:
    """What one layer of a local model sees on the first `length` tokens of one of `CORPORA`, and those tokens.

    Raises:
        UsageError: for a model that cannot be loaded, a text that is shorter, or a layer without such attention.
    """
    model, tokenizer = load_model(folder, dtype, device)
    tokens = first_tokens(tokenizer, text, CORPORA[text](), length)
    found = capture_layers(model, tokens.ids, [layer])
    if layer not in found:
        raise UsageError(f"layer {layer} of the model in {folder} has no attention over queries, keys and values")
    return found[layer], tokens


def capture_layers(model: Any, token_ids: Sequence[int], layers: Sequence[int]) -> dict[int, Inputs]:
    """Query `[1, Hq, n, D]`, key and value `[1, Hkv, n, D]` as each layer's attention gets them, positions applied.

    Layers count from 0; one pass of a transformers model, which loses the layers above them, serves them all. Where a
    model's scale is not 1/sqrt(D), its queries are multiplied so that this scale gives the model's scores.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    captured: dict[int, Inputs] = {}

    def capturing(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            factor = (options.get("scaling") or query.shape[-1] ** -0.5) * query.shape[-1] ** 0.5
            scaled = query if abs(factor - 1) < 1e-6 else query * factor
            captured[module.layer_idx] = Inputs(scaled.contiguous(), key.contiguous(), value.contiguous())
        return sdpa_attention_forward(module, query, key, value, *arguments, **options)

    AttentionInterface.register("capturing", capturing)
    AttentionMaskInterface.register("capturing", sdpa_mask)
    model.set_attn_implementation("capturing")
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[: max(layers) + 1]
    with torch.no_grad():
        decoder(torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    found = dict(captured)
    captured.clear()  # transformers keeps the function, and with it what it holds
    return found
