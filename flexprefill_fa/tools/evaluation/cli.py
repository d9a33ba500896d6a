"""`flexprefill eval`: task accuracy of dense and sparse prefill, one row per task, length and selector."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flexprefill_fa.choice import Choice, parse_choice
from flexprefill_fa.tools.loading import (
    UsageError,
    first_line,
    load_model,
    model_name,
    one_line_errors,
    require_kernels,
    resolve_device,
    resolve_dtype,
    token_count,
)
from flexprefill_fa.tools.options import USUAL, Device, Dtype, Model
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.reporting import open_console, settings_text
from flexprefill_fa.tools.rows import Row, append, rows_before

_COLUMNS = ("task", "tokens", "selector", "settings", "accuracy", "density", "recall", "prefill ms")


def evaluate(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated: offline_ruler, needle, or any task, group or tag of lm-eval.")
    ] = "offline_ruler",
    selector: Annotated[
        list[str] | None,
        typer.Option(
            help="dense, or name:field=value+field=value, where mean_correction=tilted and dense_layers=0/4 are fields "
            f"too. May be repeated; default: dense, and {USUAL}."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer together, comma-separated, where a task takes a length.")
    ] = "4096,8192,16384,32768",
    samples: Annotated[int, typer.Option(min=1, help="Questions per row at most.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions.")] = 0,
    out: Annotated[
        Path, typer.Option(help="JSON lines; rows are added, and those that are there are not measured again.")
    ] = Path("quality.jsonl"),
    include_path: Annotated[
        list[Path] | None, typer.Option(help="A folder with more lm-eval task files. May be repeated.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="A folder with datasets under their names, for tasks that need some.")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="For models tuned to follow a chat.")] = False,
    measured_prompts: Annotated[
        int, typer.Option(min=0, max=8, help="Prompts per row for prefill time and recall (exact attention: slow).")
    ] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout, the table on stderr.")] = False,
) -> None:
    """Measure the task accuracy of a local model with dense and with sparse prefill, by lm-evaluation-harness.

    Rows are kept as they are finished: the same command goes on where it was stopped. Exits with 2 if a task could not
    be asked; the others are.
    """
    console = Console(file=sys.stderr, highlight=False)  # this stderr, whatever is redirected meanwhile
    rows: list[Row] = []
    failures: list[str] = []

    def failed(line: str) -> None:
        failures.append(line)
        typer.echo(f"error: {line}", err=True)

    with one_line_errors():
        from flexprefill_fa.tools.evaluation.harness import Tasks, require_lm_eval

        require_lm_eval()
        choices = dict.fromkeys(parse_choice(spec) for spec in selector or ())
        numbers = tuple(sorted({token_count(item.strip()) for item in lengths.split(",")}))
        where, precision = resolve_device(device), resolve_dtype(dtype)
        require_kernels(where)
        before = rows_before(out)
        progress = WorkProgress(console)
        with progress.task("finding tasks"):
            found = Tasks([name.strip() for name in tasks.split(",")], include_path or (), data_dir)
        with progress.task("loading the model"):
            network, tokenizer = load_model(model, precision, where)
        if chat_template and not tokenizer.chat_template:
            raise UsageError(f"--chat-template needs a tokenizer with a chat template, that of {model} has none")
        from flexprefill_fa.integrations.lm_eval import FlexPrefillLM, default_choice
        from flexprefill_fa.tools.evaluation.cells import Evaluation, EvaluationPlan, count_cells
        from flexprefill_fa.tools.generation import refusal_in_one_line

        if not choices:
            with refusal_in_one_line():
                choices = dict.fromkeys((Choice(None), default_choice(network)))
        plan = EvaluationPlan(
            lengths=numbers,
            samples=samples,
            choices=tuple(choices),
            seed=seed,
            chat_template=chat_template,
            measured_prompts=measured_prompts,
        )
        lm = FlexPrefillLM(network, "dense", tokenizer=tokenizer, batch_size=batch_size)
        with progress.task("reading the weights for their hash"):
            evaluation = Evaluation(lm, found, plan, model_name(model), model)
        try:
            with progress.task(f"{', '.join(found.names)}", count_cells(plan, found)) as advance:
                for cell in evaluation.cells(before, failed):
                    row = evaluation.run(cell)
                    append(out, row)
                    rows.append(row)
                    console.print(_line(row), markup=False, soft_wrap=True)
                    if as_json:
                        typer.echo(json.dumps(row))
                    if advance is not None:
                        advance()
        except KeyboardInterrupt as error:
            console.print(
                f"stopped: {len(rows)} new rows are in {out}; the same command goes on from there", markup=False
            )
            raise typer.Exit(130) from error
        except torch.OutOfMemoryError as error:
            raise UsageError(f"{first_line(error)} ({len(rows)} new rows are kept in {out})") from error
    if rows:
        open_console(stderr=as_json).print(_table(rows))
    elif not failures:
        console.print(f"every row of this plan is in {out} already", markup=False)
    if failures:
        raise typer.Exit(2)


def _line(row: Row) -> str:
    length = "" if row["length"] is None else f" at {row['length']} tokens"
    who = " ".join(filter(None, (row["selector"], settings_text(row))))
    return f"{row['task']}{length}, {who}: {row['metric']} {row['accuracy']:.3f}, density {row['density']:.3f}"


def _table(rows: list[Row]) -> Table:
    first = rows[0]
    table = Table(title=f"{first['model']}, {first['gpu']}, {first['dtype']}, at most {first['limit']} samples a row")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("task", "selector", "settings") else "right")
    for row in rows:
        length, prefill = row["length"], row["timing"]["prefill_ms"]
        numbers = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("accuracy", "density", "recall")]
        cells = [row["task"], "-" if length is None else str(length), row["selector"], settings_text(row), *numbers]
        table.add_row(*cells, "-" if prefill is None else f"{prefill:.1f}")
    return table
