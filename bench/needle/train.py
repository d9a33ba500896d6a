"""`python -m bench.needle.train`: make the needle model again, from the standard library's source to a folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.needle.batches import Builder
from bench.needle.corpus import Corpus, build_corpus
from bench.needle.learning import make_optimizer, take_step
from bench.needle.network import attention_kernel, export, make_network
from bench.needle.settings import FULL, Settings
from bench.paths import ROOT
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import resolve_device

_TOLD = 20  # steps from one line about the losses to the next


def train_model(
    settings: Settings, corpus: Corpus, folder: Path, device: torch.device, say: Callable[[str], object]
) -> None:
    """Train a model and write it to a folder. On a GPU the layers are compiled."""
    torch.manual_seed(settings.seed)
    network = make_network(settings.config).to(device)
    optimizer, builder = make_optimizer(network, settings), Builder(corpus.tokenizer, corpus.tokens, device)
    first = 0
    with attention_kernel(device):
        for stage in settings.stages:
            say(f"steps {first} to {first + stage.steps}: {stage.rows} x {stage.length} tokens each")
            if device.type == "cuda":
                torch.compiler.reset()  # what was compiled for another length is of no more use
                for layer in network.model.layers:
                    layer.compile(dynamic=False)
            for step in range(first, first + stage.steps):
                losses = take_step(network, optimizer, builder, settings, step)
                if step % _TOLD == 0 or step == settings.steps - 1:
                    told = {name: loss.item() for name, loss in losses.items()}
                    say(f"step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in told.items()))
                    if not math.isfinite(told["loss"]):
                        raise ValueError(f"the loss is {told['loss']} at step {step}")
            first += stage.steps
    export(network, settings.config, corpus.tokenizer, folder)


def train(
    out: Annotated[Path, typer.Option(help="The model's folder.")] = ROOT / "build" / "needle" / "model",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the first weights and of what is drawn.")] = 0,
) -> None:
    """Train the needle model on one GPU. The same Python version gives the same tokenizer and text."""
    with one_line_errors():
        device = resolve_device("cuda")
        out.mkdir(parents=True, exist_ok=True)
        train_model(replace(FULL, seed=seed), build_corpus(), out, device, typer.echo)
    typer.echo(f"the model is in {out}: python -m bench.needle.evaluate --model {out}")


if __name__ == "__main__":
    typer.run(train)
