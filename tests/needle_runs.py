"""The needle model's recipe at a size that learns nothing: runs of it, and its commands as a shell sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from bench.needle.batches import Builder
from bench.needle.corpus import Corpus
from bench.needle.network import model_config
from bench.needle.settings import Goal, Settings, Stage
from bench.needle.train import train_model
from flexprefill_fa.tools.needle.formats import EVALUATED, Mix

CPU = torch.device("cpu")
FILES = 12
"""Of the corpus."""

TINY = Settings(
    config=model_config()
    | {"hidden_size": 64, "intermediate_size": 128}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1},
    stages=(
        Stage(256, 2, 2, 0.5, (Mix(needles=4, asked=1), Mix(chains=1, chains_asked=1))),
        Stage(640, 2, 2, 0.5, (Mix(4, 1, 1, 1, 1, 1, 1),), (Mix(needles=4, asked=2, chains=1, chains_asked=1),)),
    ),
    warm_up=1,
    goals=(Goal(700, 2, 0.0),),
)
"""Every step of the way in a second."""


def run_in(folder: Path, corpus: Corpus, settings: Settings = TINY) -> list[str]:
    """What a run tells."""
    told: list[str] = []
    train_model(settings, corpus, folder, CPU, told.append)
    return told


def least_length(builder: Builder, mix: Mix) -> int:
    """The shortest sequence that holds a mix."""
    with pytest.raises(ValueError, match="length must be at least") as error:
        builder.build(1, 1, mix, torch.Generator())
    return int(str(error.value).split()[5])


def source_drawn(builder: Builder) -> bytes:
    """A piece of the text that a builder's sequences are made of, as bytes of uint16 like a corpus's parts."""
    batch = builder.build(1, 700, EVALUATED["single"], torch.Generator().manual_seed(0))
    return batch.tokens[batch.source].numpy().astype("uint16").tobytes()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def command(function: Any, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, arguments)
