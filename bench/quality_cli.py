"""`python -m bench quality`: density, recall and output error of selectors on the needle model's layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.needle.capture import model_config
from bench.paths import RESULTS
from bench.quality import BACKEND, QualityPlan, quality_rows, sweep
from bench.quality_tables import quality_line, quality_summary
from bench.spec import check_backends, parse_layers, parse_lengths, parse_list, parse_selector
from bench.terminal import one_line_errors
from flexprefill_fa.tools.loading import UsageError, first_line, require_kernels, resolve_device, resolve_dtype
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, require_appendable


def quality(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "8192,32768",
    selectors: Annotated[
        str | None,
        typer.Option(help="Comma-separated; name or name:field=value+field=value. Default: a sweep of every selector."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Of the needle model, comma-separated; all by default.")] = None,
    mean_correction: Annotated[
        bool | None, typer.Option("--mean-correction/--no-mean-correction", help="Both by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the prompt.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are added.")] = RESULTS / "quality.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")] = False,
) -> None:
    """Compare what selectors keep, and what their outputs lose against exact attention, on a trained model's heads.

    Exits with 1 if a setting failed and with 2 if something could not run.
    """
    console = open_console(stderr=True)
    rows: list[Row] = []
    failures: list[str] = []

    def failed(line: str) -> None:
        failures.append(line)
        console.print(f"failed: {line}", markup=False, soft_wrap=True)

    with one_line_errors():
        plan = _plan(selectors, layers, mean_correction, dtype, device, seed)
        wanted = parse_lengths(lengths)
        require_appendable(out)
        try:
            for length in wanted:
                with WorkProgress(console).task(f"{length} tokens", plan.steps()) as advance:
                    for row in quality_rows(plan, length, failed):
                        rows.append(row)
                        append(out, row)
                        console.print(quality_line(row), markup=False, soft_wrap=True)
                        if as_json:
                            typer.echo(json.dumps(row))
                        if advance is not None:
                            advance()
        except torch.OutOfMemoryError as error:
            raise UsageError(first_line(error)) from error
    if rows:
        open_console(stderr=as_json).print(quality_summary(rows))
    if failures:
        raise typer.Exit(1)


def _plan(
    selectors: str | None, layers: str | None, correction: bool | None, dtype: str, device: str, seed: int
) -> QualityPlan:
    """The plan of a command line, checked before any work."""
    specs = sweep() if selectors is None else parse_list("selectors", selectors)
    configs = [parse_selector(spec) for spec in specs]
    where, precision = resolve_device(device), resolve_dtype(dtype)
    if precision is None:
        raise UsageError("dtype must be bfloat16, float16 or float32, got 'auto'")
    model = model_config()
    require_kernels(where)
    sizes = sorted({config.block_size for config in configs})
    check_backends([BACKEND[where.type]], precision, model["head_dim"], sizes, where)
    return QualityPlan(
        configs=configs,
        corrections=(False, True) if correction is None else (correction,),
        layers=parse_layers(layers, model["num_hidden_layers"]),
        dtype=precision,
        device=where,
        seed=seed,
    )
