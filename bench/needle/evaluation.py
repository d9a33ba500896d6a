"""Dense accuracy of the needle model on each task and length, on held-out text."""

from __future__ import annotations

import hashlib
import platform
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.needle.batches import Batch, Builder
from bench.needle.network import Network
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.rows import Row, environment

_TOKENS_AT_ONCE = 131072


def accuracy_facts(model: Path, text: np.ndarray, seed: int, device: torch.device) -> Row:
    """What rows about a model's accuracies say beside them: which model it is, what it was asked, the conditions.

    Args:
        model: its folder.
        text: tokens of the held-out text.
        seed: of the questions.
        device: where they were answered.
    """
    asked = hashlib.sha256(repr(sorted(EVALUATED.items())).encode() + text.tobytes()).hexdigest()
    facts = {"kind": "needle", "model_sha256": model_sha256(model), "asked_sha256": asked, "seed": seed}
    return {**facts, "python": platform.python_version(), **environment(device)}


@torch.no_grad()
def measure(network: Network, builder: Builder, task: str, length: int, samples: int, seed: int) -> Row:
    """Ask `samples` questions, each at the end of a text of its own.

    The model reads the right answer and must find each token of it the most likely one, which is so exactly where
    greedy decoding gives that answer.

    Args:
        network: in eval mode or not: it has no dropout.
        builder: of held-out text.
        task: one of `EVALUATED`.
        length: tokens of text, question and answer.
        samples: how many questions.
        seed: of the questions.

    Returns:
        "exact", the share of the questions whose whole answer is right; "parts", that of the names and digits that are
        right, each behind the right ones before it; the three arguments that it depends on.

    Raises:
        ValueError: where the text is too short.
    """
    device = next(network.parameters()).device
    rows = min(samples, max(1, _TOKENS_AT_ONCE // length))
    right: list[Tensor] = []
    share: list[Tensor] = []
    for first in range(0, samples, rows):
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{task} {length} {seed} {first}".encode()))
        batch = builder.build(min(rows, samples - first), length, EVALUATED[task], generator, questions_last=True)
        found = predictions(network, batch)[:, batch.scored]
        correct = found == batch.targets[:, batch.scored]
        right.append(correct.all(1))
        share.append(correct[:, batch.weights[batch.scored] == 1].float().mean(1))
    exact, parts = (round(torch.cat(found).float().mean().item(), 4) for found in (right, share))
    return {"task": task, "length": length, "samples": samples, "exact": exact, "parts": parts}


def predictions(network: Network, batch: Batch) -> Tensor:
    """The most likely token `[B, A]` at each place of the answers."""
    hidden = network(batch.tokens)
    return network.logits(gather_hidden(hidden, batch.places)).argmax(-1)


def gather_hidden(hidden: Tensor, places: Tensor) -> Tensor:
    """The states `[B, A, hidden]` that predict the tokens at `places` `[B, A]`: those one before."""
    return hidden.gather(1, (places - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
