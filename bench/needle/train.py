"""`python -m bench.needle.train`: train the needle model, export it and measure its accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.needle.batches import Builder
from bench.needle.evaluate import accuracies
from bench.needle.learning import make_optimizer, mean_row, take_step
from bench.needle.network import attention_kernel, export, make_network
from bench.needle.prepare import WORK, Corpus, load_corpus
from bench.needle.settings import FULL, Settings
from bench.needle.tables import RUNS, conditions_of, questions_of
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import resolve_device
from flexprefill_fa.tools.rows import Row, append


def train_model(
    settings: Settings, corpus: Corpus, folder: Path, device: torch.device, say: Callable[[str], object]
) -> list[Row]:
    """Train a model, write it to the folder 'model' in `folder`, and measure it; the accuracies.

    The curve of its losses and its accuracies lie beside it, all made anew. On a GPU the layers are compiled.
    """
    curve, measured = folder / "curve.jsonl", folder / "accuracy.jsonl"
    for path in (curve, measured):
        path.unlink(missing_ok=True)
    torch.manual_seed(settings.seed)
    network = make_network(settings.config).to(device)
    optimizer, training = make_optimizer(network, settings), Builder(corpus.tokenizer, corpus.train, device)
    step, every, means = 0, settings.steps_per_row, {"loss": math.nan}
    with attention_kernel(device):
        for number, stage in enumerate(settings.stages):
            end = step + stage.steps
            say(f"stage {number}: steps {step} to {end}, {stage.rows} x {stage.length} tokens each")
            if device.type == "cuda":
                torch.compiler.reset()  # what was compiled for another length is of no more use
                for layer in network.model.layers:
                    layer.compile(dynamic=False)
            while step < end:
                steps = range(step, min(end, step - step % every + every))
                means = mean_row([take_step(network, optimizer, training, settings, index) for index in steps])
                step = steps.stop
                if not math.isfinite(means["loss"]):
                    raise ValueError(f"the loss is {means['loss']} at step {step}")
                rate = settings.learning_rate(step - 1)
                append(curve, {"step": step, "stage": number, "tokens": stage.length, "learning_rate": rate, **means})
            say(f"step {step}: loss {means['loss']:.4f}")
        export(network, settings.config, corpus.folder, folder / "model")
        rows = []
        for row in accuracies(folder / "model", corpus.held_out, settings, device):
            append(measured, row)
            rows.append(row)
            say(f"{row['task']} at {row['length']} tokens: {row['exact']:.3f} exact, {row['parts']} of the parts")
    return rows


def train(
    out: Annotated[Path, typer.Option(help="The work folder: corpus, curve, accuracies, model.")] = WORK,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the first weights and of what is drawn.")] = 0,
) -> None:
    """Train the needle model on one GPU, measure its dense accuracy, and write it to the folder 'model' in --out.

    Exits with 1 where the finished model misses an accuracy that it was to reach.
    """
    with one_line_errors():
        settings = replace(FULL, seed=seed)
        device = resolve_device("cuda")
        rows = train_model(settings, load_corpus(out / "corpus"), out, device, typer.echo)
    typer.echo(f"{RUNS.grid(rows)}\n\nQuestions of each task: {questions_of(rows)}.\n{conditions_of(rows)}.")
    typer.echo(f"the model is in {out / 'model'}")
    if missed := missed_goals(settings, rows):
        again = "try another --seed, with a corpus in a folder of its own (--out)"
        typer.echo(f"error: {', '.join(missed)}; {again}", err=True)
        raise typer.Exit(1)


def missed_goals(settings: Settings, rows: Sequence[Row]) -> list[str]:
    """What a finished model does worse than it should, each as a phrase."""
    wanted = {goal.length: goal.exact for goal in settings.goals}
    return [
        f"{row['task']} at {row['length']:,} tokens must reach {wanted[row['length']]}, got {row['exact']:.3f}"
        for row in rows
        if row["exact"] < wanted[row["length"]]
    ]


if __name__ == "__main__":
    typer.run(train)
