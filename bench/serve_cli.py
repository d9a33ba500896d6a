"""`python -m bench serve`: a prefill-heavy load on a serving engine, with and without sparse prefill."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.paths import RESULTS
from bench.serve import LoadPlan, load_rows
from bench.serve_job import EngineError
from bench.serve_tables import ENGINES, serve_tables
from bench.spec import parse_lengths
from bench.terminal import one_line_errors, plain
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, require_appendable


def serve(
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, comma-separated.")
    ] = "4096,16384,65536,131072",
    settings: Annotated[str, typer.Option(help="Of the backend, as a JSON object.")] = "{}",
    density: Annotated[float, typer.Option(help="Of the blocks that the sparse engine attends over.")] = 0.05,
    repeats: Annotated[int, typer.Option(min=1, help="Of each prompt below 64K tokens; longer ones get a third.")] = 7,
    batched_tokens: Annotated[int, typer.Option(min=128, help="The most prompt tokens of a step.")] = 8192,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; 32 make the shape of Llama-3.1-8B.")] = 32,
    only: Annotated[
        str, typer.Option(help="all, engines, one of them (default, sparse), or gather: reading the cache alone.")
    ] = "all",
    out: Annotated[
        Path | None, typer.Option(help="JSON lines; rows are added. Default: bench/results/ENGINE.jsonl.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")] = False,
) -> None:
    """Time to first token and throughput of an engine's default backend and of sparse prefill, random weights.

    Exits with 2 if something could not run.
    """
    console = open_console(stderr=True)
    rows: list[Row] = []
    with one_line_errors():
        plan = LoadPlan(
            parse_lengths(lengths), _object(settings), density, repeats, batched_tokens, layers, only=only, name=engine
        )
        title = ENGINES[engine].title
        rows_to = out or RESULTS / f"{engine}.jsonl"
        if not 0 < density <= 1:
            raise UsageError(f"density must be in (0, 1], got {density:g}")
        if not torch.cuda.is_available():
            raise UsageError(f"{title} is measured on a CUDA GPU, and there is none")
        if only != "gather" and importlib.util.find_spec(engine) is None:
            raise UsageError(f"{title} is not installed: pip install 'flexprefill-fa[{engine}]'")
        require_appendable(rows_to)
    try:
        for row in load_rows(plan, plain(console)):
            rows.append(row)
            append(rows_to, row)
            if as_json:
                typer.echo(json.dumps(row))
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(serve_tables(rows), err=as_json)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"settings must be a JSON object, got {text!r}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UsageError(f"settings must be a JSON object, got {text!r}")
    return found
