"""`python -m bench.needle.evaluate`: the dense accuracy of a needle model, by task and length, on held-out text."""

from __future__ import annotations

import hashlib
import json
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from bench.needle.batches import Batch, Builder
from bench.needle.network import attention_kernel, hidden_states, logits_at
from bench.needle.prepare import encode
from bench.needle.settings import FULL, Settings
from bench.needle.tables import RUNS
from bench.terminal import one_line_errors
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.loading import load_model, resolve_device
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files
from flexprefill_fa.tools.rows import Row, environment

_TOKENS_AT_ONCE = 131072


def accuracies(model: Path, text: np.ndarray | None, settings: Settings, device: torch.device) -> Iterator[Row]:
    """The dense accuracy of each task at the length of each of the settings' goals, with the conditions in each row.

    `text` are the model's tokens of held-out text, None for those of this Python.
    """
    with attention_kernel(device):
        network, loaded = load_model(model, torch.bfloat16, device)
        tokenizer: Any = loaded.backend_tokenizer
        text = encode(tokenizer, [ascii_text(file) for file in held_out_files()]) if text is None else text
        asked = hashlib.sha256(repr(sorted(EVALUATED.items())).encode() + text.tobytes()).hexdigest()
        facts = {"kind": "needle", "model_sha256": model_sha256(model), "asked_sha256": asked, "seed": settings.seed}
        facts |= {"python": platform.python_version(), **environment(device)}
        builder = Builder(tokenizer, text, device)
        for goal in settings.goals:
            for task in EVALUATED:
                yield {**measure(network, builder, task, goal.length, goal.samples, settings.seed), **facts}


@torch.no_grad()
def measure(network: nn.Module, builder: Builder, task: str, length: int, samples: int, seed: int) -> Row:
    """Ask `samples` questions of a task of `EVALUATED`, each at the end of `length` tokens of a text of its own.

    The model reads the right answer and must find each token of it the most likely one, which is so exactly where
    greedy decoding gives that answer: "exact" is the share of the questions whose whole answer is right, "parts" that
    of the names and digits that are right, each behind the right ones before it.
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


def predictions(network: nn.Module, batch: Batch) -> Tensor:
    """The most likely token `[B, A]` at each place of the answers."""
    return logits_at(network, hidden_states(network, batch.tokens), batch.places).argmax(-1)


def evaluate(
    model: Annotated[Path, typer.Option(help="A folder that bench.needle.train made.")] = MODEL_DIR,
) -> None:
    """Measure how often each task's whole answer is right, on text that is held out from training.

    Prints JSON lines, as `bench/results/needle.jsonl` holds them, and a table on stderr.
    """
    rows = []
    with one_line_errors():
        for row in accuracies(model, None, FULL, resolve_device("auto")):
            rows.append(row)
            typer.echo(json.dumps(row))
    typer.echo(RUNS.grid(rows), err=True)


if __name__ == "__main__":
    typer.run(evaluate)
