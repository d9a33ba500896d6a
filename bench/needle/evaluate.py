"""`python -m bench.needle.evaluate`: the dense accuracy of a needle model, by task and length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.needle.batches import Builder
from bench.needle.card import accuracy_table
from bench.needle.corpus import encode
from bench.needle.evaluation import accuracy_facts, measure
from bench.needle.release import load_release
from bench.needle.run import attention_kernel
from bench.needle.settings import FULL
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import resolve_device
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files


def evaluate(
    model: Annotated[Path, typer.Option(help="A folder that bench.needle.train made.")] = MODEL_DIR,
) -> None:
    """Measure how often each task's whole answer is right, on text that is held out from training.

    Prints JSON lines, as `bench/results/needle.jsonl` holds them, and a table on stderr.
    """
    with one_line_errors():
        device = resolve_device("auto")
        with attention_kernel(device):
            network, tokenizer = load_release(model, device)
            text = encode(tokenizer, [ascii_text(file) for file in held_out_files()])
            builder, facts = Builder(tokenizer, text, device), accuracy_facts(model, text, 0, device)
            rows = []
            for goal in FULL.goals:
                for task in EVALUATED:
                    rows.append({**measure(network, builder, task, goal.length, goal.samples, 0), **facts})
                    typer.echo(json.dumps(rows[-1]))
    typer.echo(accuracy_table(rows), err=True)


if __name__ == "__main__":
    typer.run(evaluate)
