"""`python -m bench.needle.evaluate`: the dense accuracy of a needle model, by task and length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.needle.batches import Builder
from bench.needle.card import accuracy_table
from bench.needle.corpus import PACKAGES, encode
from bench.needle.evaluation import accuracy_facts, measure
from bench.needle.release import load_release, load_tokenizer
from bench.needle.run import attention_kernel, require_flash
from bench.needle.settings import FULL
from bench.spec import parse_lengths, parse_list
from bench.terminal import one_line_errors, require_packages
from flexprefill_fa.tools.loading import UsageError, resolve_device
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files
from flexprefill_fa.tools.rows import append, require_appendable

_OTHERS = 128  # questions at lengths that no goal names
_LENGTHS = ",".join(str(goal.length) for goal in FULL.goals)


def evaluate(
    model: Annotated[Path, typer.Option(help="A folder that bench.needle.train made.")] = MODEL_DIR,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(EVALUATED),
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = _LENGTHS,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help=f"Questions per task and length. Default: as after training, else {_OTHERS}."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions.")] = 0,
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON lines; rows are added.")] = None,
) -> None:
    """Measure how often each task's whole answer is right, on text that is held out from training."""
    with one_line_errors():
        require_packages(*PACKAGES)
        where = resolve_device(device)
        require_flash(where)
        network, tokenizer = load_release(model, where), load_tokenizer(model)
        chosen = parse_list("tasks", tasks)
        unknown = [task for task in chosen if task not in EVALUATED]
        if unknown:
            raise UsageError(f"tasks must be of {', '.join(EVALUATED)}, got {unknown[0]!r}")
        text = encode(tokenizer, [ascii_text(file) for file in held_out_files()])
        asked = parse_lengths(lengths)
        if max(asked) > len(text):
            raise UsageError(f"lengths must be at most {len(text)}, the tokens of held-out text, got {max(asked)}")
        counts = {goal.length: goal.samples for goal in FULL.goals}
        builder, facts = Builder(tokenizer, text, where), accuracy_facts(model, text, seed, where)
        for task in chosen:
            if min(asked) < (least := builder.least_length(EVALUATED[task])):
                raise UsageError(f"lengths must be at least {least} tokens for {task}, got {min(asked)}")
        if out is not None:
            require_appendable(out)
        typer.echo(f"on {where}", err=True)
        rows = []
        with attention_kernel(where):
            for length in asked:
                for task in chosen:
                    count = samples or counts.get(length, _OTHERS)
                    found = measure(network, builder, task, length, count, seed)
                    rows.append({**found.row(task, length), **facts})
                    typer.echo(json.dumps(rows[-1]))
                    if out is not None:
                        append(out, rows[-1])
    typer.echo(accuracy_table(rows), err=True)


if __name__ == "__main__":
    typer.run(evaluate)
