"""`python -m bench.needle.evaluate`: the dense accuracy of a needle model, by task and length, on held-out text."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.needle.batches import Batch, Builder
from bench.needle.corpus import encode
from bench.needle.network import attention_kernel, hidden_states, logits_at
from bench.needle.settings import FULL, Settings
from bench.needle.tables import RUNS, conditions_of, questions_of
from bench.tables import markdown
from bench.terminal import one_line_errors
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.loading import load_model, resolve_device
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files
from flexprefill_fa.tools.rows import Row, environment

_TOKENS_AT_ONCE = 131072


@torch.no_grad()
def measure(network: nn.Module, builder: Builder, task: str, length: int, samples: int, seed: int) -> Row:
    """Ask `samples` questions of a task of `EVALUATED`, each at the end of `length` tokens of a text of its own.

    The model reads the right answer and must find each token of it the most likely one, which is so exactly where
    greedy decoding gives that answer: "exact" is the share of the questions whose whole answer is right.
    """
    device = next(network.parameters()).device
    rows = min(samples, max(1, _TOKENS_AT_ONCE // length))
    right = 0
    for first in range(0, samples, rows):
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{task} {length} {seed} {first}".encode()))
        batch = builder.build(min(rows, samples - first), length, EVALUATED[task], generator, questions_last=True)
        correct = (predictions(network, batch) == batch.targets)[:, batch.scored]
        right += int(correct.all(1).sum())
    return {"task": task, "length": length, "samples": samples, "exact": round(right / samples, 4)}


def predictions(network: nn.Module, batch: Batch) -> Tensor:
    """The most likely token `[B, A]` at each place of the answers."""
    return logits_at(network, hidden_states(network, batch.tokens), batch.places).argmax(-1)


def evaluate(
    model: Annotated[Path, typer.Option(help="A folder that bench.needle.train made.")] = MODEL_DIR,
) -> None:
    """Measure how often each task's whole answer is right, on text that is held out from training.

    Prints JSON lines, as `bench/results/needle.jsonl` holds them, and on stderr what a card says of them. Exits with 1
    where the model misses an accuracy that it was to reach.
    """
    rows: list[Row] = []
    with one_line_errors(), attention_kernel(device := resolve_device("auto")):
        network, loaded = load_model(model, torch.bfloat16, device)
        tokenizer: Any = loaded.backend_tokenizer
        text = encode(tokenizer, [ascii_text(file) for file in held_out_files()])
        asked = hashlib.sha256(repr(sorted(EVALUATED.items())).encode() + text.tobytes()).hexdigest()
        facts = {"kind": "needle", "model_sha256": model_sha256(model), "asked_sha256": asked, "seed": FULL.seed}
        facts |= {"python": platform.python_version(), **environment(device)}
        builder = Builder(tokenizer, text, device)
        for goal, task in itertools.product(FULL.goals, EVALUATED):
            rows.append({**measure(network, builder, task, goal.length, goal.samples, FULL.seed), **facts})
            typer.echo(json.dumps(rows[-1]))
    typer.echo(f"{markdown(RUNS.lines(rows))}\n\nQuestions of each task: {questions_of(rows)}.", err=True)
    typer.echo(f"{conditions_of(rows)}.", err=True)
    if missed := missed_goals(FULL, rows):
        typer.echo(f"error: {', '.join(missed)}; train with another --seed", err=True)
        raise typer.Exit(1)


def missed_goals(settings: Settings, rows: Sequence[Row]) -> list[str]:
    """What a model does worse than it should, each as a phrase."""
    wanted = {goal.length: goal.exact for goal in settings.goals}
    return [
        f"{row['task']} at {row['length']:,} tokens must reach {wanted[row['length']]}, got {row['exact']:.3f}"
        for row in rows
        if row["exact"] < wanted[row["length"]]
    ]


if __name__ == "__main__":
    typer.run(evaluate)
