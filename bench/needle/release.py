"""The finished model: a folder in Hugging Face format, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bench.needle.network import Network, Shape
from flexprefill_fa.tools.loading import UsageError, first_line

_WEIGHTS = "model.safetensors"


def export(network: Network, tokenizer: Path, folder: Path) -> None:
    """Write config, bfloat16 weights and the files of the tokenizer in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    config = json.dumps(network.shape.config(), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in network.state_dict().items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def load_release(folder: Path, device: torch.device) -> tuple[Network, Tokenizer]:
    """The model of such a folder, in bfloat16 as it is used, and its tokenizer.

    Raises:
        UsageError: where there is no such model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = Shape(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
        )
        if config != shape.config():
            raise ValueError("its config.json is not of the needle model's architecture")
        with torch.device("meta"):
            network = Network(shape)
        network.load_state_dict(load_file(folder / _WEIGHTS), assign=True)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no narrower one
        raise UsageError(f"no needle model in {folder}: {first_line(error)}") from error
    return network.to(device), tokenizer
