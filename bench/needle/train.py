"""`python -m bench.needle.train`: train the needle model, in pieces where need be, evaluate it and export it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.needle.card import accuracy_table, write_card
from bench.needle.corpus import PACKAGES, load_corpus
from bench.needle.pace import Clock, OutOfTime
from bench.needle.prepare import CORPUS, WORK
from bench.needle.run import Run, require_flash
from bench.needle.settings import SIZES, Settings
from bench.terminal import one_line_errors, require_packages
from flexprefill_fa.tools.loading import UsageError, first_line, resolve_device
from flexprefill_fa.tools.rows import Row


def train(
    out: Annotated[Path, typer.Option(help="The work folder: corpus, checkpoint, curve, accuracies, model.")] = WORK,
    minutes: Annotated[
        float | None,
        typer.Option(min=3, help="Stop with a checkpoint before so many minutes are over."),
    ] = None,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "full",
    steps_scale: Annotated[float, typer.Option(help="Times as many steps in each stage.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the first weights and of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, cuda:N or, for a try of 'tiny', cpu.")] = "cuda",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the layers; by default on a GPU.")
    ] = None,
) -> None:
    """Train the needle model on one GPU, measure its dense accuracy, and write it to the folder 'model' in --out.

    A run that was stopped goes on from its checkpoint with the same command. Exits with 3 where --minutes ended it
    before it was finished, and with 1 where the finished model misses an accuracy that it was to reach.
    """
    clock = Clock(minutes)
    with one_line_errors():
        settings = _settings(size, steps_scale, seed)
        require_packages(*PACKAGES)
        where = resolve_device(device)
        require_flash(where)
        check_memory(settings, where)
        corpus = load_corpus(out / CORPUS)
        compiled = where.type == "cuda" if compile is None else compile
        run = Run(settings, corpus, out, where, clock, compiled, typer.echo)
    typer.echo(f"{settings.steps} steps, {settings.shape.parameters / 1e6:.2f} M parameters; at step {run.step}")
    try:
        rows = run.finish()
    except (OutOfTime, KeyboardInterrupt) as stop:
        # What a key press interrupts may be half a step: the last checkpoint counts then.
        typer.echo(f"stopped at step {run.saved_step} of {settings.steps}: the same command goes on from there")
        raise typer.Exit(3 if isinstance(stop, OutOfTime) else 130) from stop
    except ArithmeticError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except (torch.OutOfMemoryError, OSError) as error:
        typer.echo(f"error: {first_line(error)}; the checkpoint is of step {run.saved_step}", err=True)
        raise typer.Exit(2) from error
    write_card(run.model, rows, settings, corpus, _told(size, steps_scale, seed))
    typer.echo(accuracy_table(rows))
    typer.echo(f"the model is in {run.model}")
    missed = missed_goals(settings, rows)
    if missed:
        again = "try another --seed or --steps-scale 1.5, prepared and trained in a folder of its own (--out)"
        typer.echo(f"error: {', '.join(missed)}; {again}", err=True)
        raise typer.Exit(1)


def _told(size: str, steps_scale: float, seed: int) -> str:
    """The options that make the same run, where they are not the usual ones."""
    told = [f"--size {size}"] if size != "full" else []
    told += [f"--steps-scale {steps_scale:g}"] if steps_scale != 1 else []
    return " ".join([*told, *([f"--seed {seed}"] if seed else [])])


def missed_goals(settings: Settings, rows: Sequence[Row]) -> list[str]:
    """What a finished model does worse than it should, each as a phrase."""
    wanted = {goal.length: goal.exact for goal in settings.goals}
    return [
        f"{row['task']} at {row['length']:,} tokens must reach {wanted[row['length']]}, got {row['exact']:.3f}"
        for row in rows
        if row["exact"] < wanted[row["length"]]
    ]


def _settings(size: str, steps_scale: float, seed: int) -> Settings:
    if size not in SIZES:
        raise UsageError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if not 0 < steps_scale < math.inf:
        raise UsageError(f"steps-scale must be a number above 0, got {steps_scale}")
    return SIZES[size].scaled(steps_scale, seed)


def check_memory(settings: Settings, device: torch.device) -> None:
    """Check that the longest stage fits the GPU.

    Raises:
        UsageError: where it needs more than is free.
    """
    if device.type != "cuda":
        return
    needed, free = settings.memory(), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise UsageError(
            f"training needs about {needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} GiB are free on "
            f"{device}"
        )


if __name__ == "__main__":
    typer.run(train)
