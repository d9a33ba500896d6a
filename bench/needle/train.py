"""`python -m bench.needle.train`: make the needle model again, from the standard library's source to a folder."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Generator, Tensor, nn

from bench import ROOT
from bench.needle.batches import TASKS, Batch, Builder
from bench.needle.corpus import Corpus, build_corpus
from bench.needle.network import attention_kernel, export, hidden_states, logits_at, make_network
from bench.needle.settings import FULL, Settings
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import resolve_device

_TOLD = 20  # steps from one line about the losses to the next


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def draw(builder: Builder, settings: Settings, step: int, generator: Generator) -> list[Batch]:
    """The sequences of a step, a batch for each mix of its stage."""
    number, inside = settings.locate(step)
    stage = settings.stages[number]
    mixes = stage.mixes_at(inside)
    size = stage.rows // len(mixes), stage.length
    return [builder.build(*size, mix, generator, last, settings.heaped if last else 0.0) for mix, last in mixes]


def take_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, builder: Builder, settings: Settings, step: int
) -> dict[str, Tensor]:
    """Make one step, a function of the weights, the optimizer's averages, the settings and `step` alone.

    The losses come as tensors that nobody has waited for yet: "loss", which was minimised, and its parts, "text" of
    source text and one for each task.
    """
    device = next(network.parameters()).device
    generator = Generator(device).manual_seed(settings.seed * 1_000_003 + step)
    batches = draw(builder, settings, step, generator)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate(step)
    # The CPU, which is for tests, computes in float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = hidden_states(network, torch.cat([batch.tokens for batch in batches]))
        parts = hidden.split([len(batch.tokens) for batch in batches])
        answers = _answer_losses(network, batches, parts)
        text = _text_loss(network, batches, parts, settings.text_share, generator)
        weight = settings.stages[settings.locate(step)[0]].text_weight
        loss = torch.stack(list(answers.values())).mean() + weight * text
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: tensor.detach() for name, tensor in {"loss": loss, "text": text, **answers}.items()}


def _answer_losses(network: nn.Module, batches: list[Batch], parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """For each task the mean of the batches' means: a text with few questions counts as much as one full of them."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    for batch, hidden in zip(batches, parts, strict=True):
        losses = _losses_at(network, hidden, batch, batch.places)
        for task, columns in batch.columns:
            weights = batch.weights[columns]
            found[task].append((losses[:, columns] * weights).mean(0).sum() / weights.sum())
    return {TASKS[task]: torch.stack(means).mean() for task, means in sorted(found.items())}


def _text_loss(
    network: nn.Module, batches: list[Batch], parts: tuple[Tensor, ...], share: float, generator: Generator
) -> Tensor:
    """The mean loss of some of the source text's tokens: enough to learn from, and a part of the memory of all."""
    total, count = [], []
    for batch, hidden in zip(batches, parts, strict=True):
        rows, length = batch.tokens.shape
        size = (rows, max(1, round(length * share)))
        places = torch.randint(1, length, size, device=hidden.device, generator=generator)
        wanted = batch.source.gather(1, places)
        total.append((_losses_at(network, hidden, batch, places) * wanted).sum())
        count.append(wanted.sum())
    return torch.stack(total).sum() / torch.stack(count).sum().clamp(min=1)


def _losses_at(network: nn.Module, hidden: Tensor, batch: Batch, places: Tensor) -> Tensor:
    """`[B, A]`, of the tokens at `places` `[B, A]`."""
    logits, targets = logits_at(network, hidden, places).float(), batch.tokens.gather(1, places)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


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
