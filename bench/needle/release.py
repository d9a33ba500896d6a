"""The finished model: a folder in Hugging Face format, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.needle.corpus import Corpus, copy_tokenizer
from bench.needle.network import HEAD_DIM, Network, Shape
from flexprefill_fa.tools.loading import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WEIGHTS = "model.safetensors"


def export(network: Network, corpus: Corpus, folder: Path) -> None:
    """Write config, bfloat16 weights and tokenizer."""
    from safetensors.torch import save_file

    copy_tokenizer(corpus, folder)
    config = json.dumps(network.shape.config(), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in network.state_dict().items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of such a folder.

    Raises:
        UsageError: where there is none, or a broken one.
    """
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"no needle model in {folder}: tokenizer.json is missing")
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the package raises no narrower one
        raise UsageError(f"no needle model in {folder}: tokenizer.json cannot be read ({error})") from error


def load_release(folder: Path, device: torch.device) -> Network:
    """The model of such a folder, in bfloat16 as it is used.

    Raises:
        UsageError: where there is no such model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = Shape(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            theta=config["rope_parameters"]["rope_theta"],
            positions=config["max_position_embeddings"],
        )
        weights = load_file(folder / _WEIGHTS)
        if config["head_dim"] != HEAD_DIM:
            raise ValueError(f"head_dim must be {HEAD_DIM}, got {config['head_dim']}")
        with torch.device("meta"):
            network = Network(shape)
        network.load_state_dict(weights, assign=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"no needle model in {folder}: {error}") from error
    return network.to(device)
