"""One step of training: its sequences, its loss, its change of the weights."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bench.needle.batches import TASKS, Batch, Builder
from bench.needle.network import hidden_states, logits_at
from bench.needle.settings import Settings


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
    build = partial(builder.build, stage.rows // len(mixes), stage.length, generator=generator)
    return [build(mix=mix, questions_last=last, heaped=settings.heaped if last else 0.0) for mix, last in mixes]


def take_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, builder: Builder, settings: Settings, step: int
) -> dict[str, Tensor]:
    """Make one step, a function of the weights, the optimizer's averages, the settings and `step` alone.

    Returns:
        The losses, as tensors that nobody has waited for yet: "loss", which was minimised, and its parts, "text" of
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
        logits = logits_at(network, hidden, batch.places).float()  # [B, A, vocabulary]
        losses = _cross_entropy(logits, batch.targets)
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
        logits = logits_at(network, hidden, places).float()
        wanted = batch.source.gather(1, places)
        total.append((_cross_entropy(logits, batch.tokens.gather(1, places)) * wanted).sum())
        count.append(wanted.sum())
    return torch.stack(total).sum() / torch.stack(count).sum().clamp(min=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
