"""`python -m bench vllm`: a prefill-heavy load on vLLM, with and without sparse prefill."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.paths import RESULTS
from bench.spec import parse_lengths
from bench.terminal import one_line_errors, plain
from bench.vllm import LoadPlan, load_rows
from bench.vllm_engine import EngineError
from bench.vllm_tables import vllm_tables
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, require_appendable


def vllm(
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, comma-separated.")
    ] = "4096,16384,65536,131072",
    settings: Annotated[str, typer.Option(help="Of the backend, a JSON object as in additional_config.")] = "{}",
    density: Annotated[float, typer.Option(help="Of the blocks that the sparse engine attends over.")] = 0.05,
    repeats: Annotated[int, typer.Option(min=1, help="Of each prompt below 64K tokens; longer ones get a third.")] = 7,
    batched_tokens: Annotated[int, typer.Option(min=128, help="vLLM's max_num_batched_tokens.")] = 8192,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; 32 make the shape of Llama-3.1-8B.")] = 32,
    only: Annotated[str, typer.Option(help="all, engines, or gather: the paged cache alone, without vLLM.")] = "all",
    out: Annotated[Path, typer.Option(help="JSON lines; rows are added.")] = RESULTS / "vllm.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")] = False,
) -> None:
    """Time to first token and throughput of vLLM's default attention backend and of sparse prefill, random weights.

    Exits with 2 if something could not run.
    """
    console = open_console(stderr=True)
    rows: list[Row] = []
    with one_line_errors():
        plan = LoadPlan(parse_lengths(lengths), _object(settings), density, repeats, batched_tokens, layers, only=only)
        if not 0 < density <= 1:
            raise UsageError(f"density must be in (0, 1], got {density:g}")
        if not torch.cuda.is_available():
            raise UsageError("vLLM is measured on a CUDA GPU, and there is none")
        if only != "gather" and importlib.util.find_spec("vllm") is None:
            raise UsageError("vLLM is not installed: pip install 'flexprefill-fa[vllm]'")
        require_appendable(out)
    try:
        for row in load_rows(plan, plain(console)):
            rows.append(row)
            append(out, row)
            if as_json:
                typer.echo(json.dumps(row))
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(vllm_tables(rows), err=as_json)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"settings must be a JSON object, got {text!r}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UsageError(f"settings must be a JSON object, got {text!r}")
    return found
