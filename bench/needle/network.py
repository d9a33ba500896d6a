"""The needle model: transformers' Llama at the sizes of the packaged config.json, and the folder that it comes in."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexprefill_fa.tools.loading import UsageError, require_transformers
from flexprefill_fa.tools.needle import MODEL_DIR


def model_config() -> dict[str, Any]:
    """The packaged model's config.json: numbers of layers and heads, head_dim.

    Its rotary base is 1e8, with which a third of each head turns less than half a radian in 128K tokens, so that
    content is compared alike at every distance.
    """
    return json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))


def make_network(config: dict[str, Any]) -> Any:
    """A causal language model in fp32 with random weights, drawn from torch's global generator; it has no dropout."""
    require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="sdpa")


def hidden_states(network: Any, tokens: Tensor) -> Tensor:
    """The last hidden states `[B, n, hidden]` of tokens `[B, n]`."""
    return network.model(input_ids=tokens, use_cache=False).last_hidden_state


def logits_at(network: Any, hidden: Tensor, places: Tensor) -> Tensor:
    """Scores `[B, A, vocabulary]` of the tokens at `places` `[B, A]`, from the states before them."""
    return network.lm_head(hidden.gather(1, (places - 1)[..., None].expand(-1, -1, hidden.shape[-1])))


def export(network: Any, config: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, bfloat16 weights and tokenizer to a folder, as transformers reads them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(MODEL_DIR / "tokenizer_config.json", folder / "tokenizer_config.json")  # the same for each
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in network.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU flash attention or nothing: the kernels that SDPA would fall back to need memory for all scores."""
    if device.type != "cuda":
        return nullcontext()
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        got = ".".join(map(str, found))
        raise UsageError(f"flash attention in bfloat16 needs a GPU of compute capability 8.0 or more, got {got}")
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
