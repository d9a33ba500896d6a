"""`python -m bench.needle.train`: train the needle model, in pieces where need be, evaluate it and export it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.needle.card import accuracy_table, write_card
from bench.needle.prepare import WORK, load_corpus
from bench.needle.run import OutOfTime, Run
from bench.needle.settings import FULL, Settings
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import resolve_device
from flexprefill_fa.tools.rows import Row


def train(
    out: Annotated[Path, typer.Option(help="The work folder: corpus, checkpoint, curve, accuracies, model.")] = WORK,
    minutes: Annotated[
        float, typer.Option(min=3, help="Stop with a checkpoint before so many minutes are over.")
    ] = math.inf,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the first weights and of what is drawn.")] = 0,
) -> None:
    """Train the needle model on one GPU, measure its dense accuracy, and write it to the folder 'model' in --out.

    A run that was stopped goes on from its checkpoint with the same command. Exits with 3 where --minutes ended it
    before it was finished, and with 1 where the finished model misses an accuracy that it was to reach.
    """
    end = time.monotonic() + 60 * minutes
    with one_line_errors():
        settings = replace(FULL, seed=seed)
        device = resolve_device("cuda")
        corpus = load_corpus(out / "corpus")
        run = Run(settings, corpus, out, device, end, typer.echo)
        typer.echo(f"{settings.steps} steps; at step {run.step}")
        try:
            rows = run.finish()
        except OutOfTime as stop:
            typer.echo(f"stopped at step {run.step} of {settings.steps}: the same command goes on from there")
            raise typer.Exit(3) from stop
        write_card(run.model, rows, settings, corpus.facts)
    typer.echo(accuracy_table(rows))
    typer.echo(f"the model is in {run.model}")
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
