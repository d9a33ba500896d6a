"""The `python -m bench` command: measure time and quality, tune, fit, calibrate, render."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import calibrate as calibration
from bench.attention import LengthBenchmark
from bench.fit import fit_rates
from bench.host import host_rows
from bench.inputs import WORKLOADS
from bench.paths import RESULTS
from bench.peers_cli import peers
from bench.planning import check_memory, head_shape, make_plan
from bench.quality_cli import quality
from bench.render import DOCUMENTS, render_document
from bench.report import calibration_table, one_line, result_table
from bench.serve_cli import serve
from bench.spec import parse_lengths, parse_list, parse_numbers, parse_selector
from bench.synthetic import block_count
from bench.terminal import one_line_errors, plain, record
from bench.ttft_cli import ttft
from bench.tune import best_tiles, tuning_rows
from flexprefill_fa.tools.loading import UsageError, require_kernels, resolve_device, resolve_dtype
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, read, require_appendable

app = typer.Typer(
    help="Benchmarks. Their rows go to bench/results/, and the tables of the README and docs/ are rendered from those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_LENGTHS = "4096,8192,16384,32768,65536,131072,262144"


@app.command()
def attention(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = _LENGTHS,
    selectors: Annotated[
        str, typer.Option(help="Comma-separated; name or name:field=value+field=value.")
    ] = "flexprefill",
    density: Annotated[
        str | None, typer.Option(help="Synthetic selections of these densities instead of selectors.")
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="Default: auto and what the device has of FLASH, TRITON and CPU.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads, 32 by default.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads, 8 by default.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=16, help="128 by default.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    workload: Annotated[str, typer.Option(help=f"One of {', '.join(WORKLOADS)}.")] = WORKLOADS[0],
    layer: Annotated[int, typer.Option(min=0, help="Of the needle model, for that workload.")] = 2,
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each time.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Fewer repeats where they would take longer.")] = 5.0,
    dense: Annotated[bool, typer.Option(help="Time the dense kernels too.")] = True,
    mean_correction: Annotated[bool, typer.Option(help="Time attention with mean correction too.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are added.")] = RESULTS / "attention.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")] = False,
) -> None:
    """Time selection and attention beside dense attention, on structured inputs, after checking the outputs.

    Exits with 1 if an output was wrong and with 2 if something could not run.
    """
    console = open_console(stderr=True)
    with one_line_errors():
        plan = make_plan(
            configs=[] if density else [parse_selector(spec) for spec in parse_list("selectors", selectors)],
            densities=parse_numbers("density", density, 1) if density else [],
            backends=backends,
            shape=head_shape(workload, layer, heads, kv_heads, head_dim),
            batch=batch,
            dtype=dtype,
            workload=workload,
            layer=layer,
            device=device,
            seed=seed,
            repeats=repeats,
            seconds=seconds,
            dense=dense,
            mean_correction=mean_correction,
        )
        wanted = parse_lengths(lengths)
        for length, share in itertools.product(wanted, plan.densities):
            block_count(length, share)
        check_memory(plan, wanted)
        require_appendable(out)

    def rows_of(length: int) -> Iterator[Row]:
        return LengthBenchmark(plan, length, plain(console)).rows()

    rows, skipped = record(wanted, rows_of, plan.steps(), out=out, as_json=as_json, console=console, line=one_line)
    if rows:
        open_console(stderr=as_json).print(result_table(rows))
    if any("error" in row for row in rows):
        raise typer.Exit(1)
    if skipped:
        raise typer.Exit(2)


app.command()(quality)
app.command()(ttft)
app.command()(serve)
app.command()(peers)


@app.command()
def calibrate(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "4096",
    sharpness: Annotated[str, typer.Option(help="Factors to try, comma-separated.")] = "0.4,0.6,0.8,1,1.2,1.4,1.6",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Find the sharpness at which the heads of the "sharpened" series reach their target density, on the CPU.

    Takes about a second per head and sharpness at 64K tokens, four times that at 256K.
    """
    with one_line_errors():
        factors = parse_numbers("sharpness", sharpness, 10)
        for length in parse_lengths(lengths):
            with WorkProgress().task(f"{length} tokens", calibration.HEADS) as advance:
                densities = calibration.head_densities(length, factors, seed, advance)
            open_console(stderr=False).print(calibration_table(length, factors, densities))


@app.command()
def tune(
    head_dims: Annotated[str, typer.Option(help="Comma-separated.")] = "64,128,256",
    length: Annotated[int, typer.Option(min=1024, help="Tokens.")] = 32768,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each time.")] = 10,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are added.")] = RESULTS / "tuning.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout.")] = False,
) -> None:
    """Try tiles of FlexAttention's Triton kernel on this GPU, for the table in flexprefill_fa/backends.py."""
    with one_line_errors():
        precision = resolve_dtype(dtype)
        if precision not in (torch.bfloat16, torch.float16):
            raise UsageError(f"dtype must be bfloat16 or float16, got {dtype!r}")
        dims = [int(item) for item in parse_list("head-dims", head_dims) if item.isdecimal() and 16 <= int(item) <= 256]
        if len(dims) != len(parse_list("head-dims", head_dims)):
            raise UsageError(f"head-dims must be whole numbers from 16 to 256, got {head_dims!r}")
        if not torch.cuda.is_available():
            raise UsageError("tiles are tuned on a CUDA GPU, and there is none")
        require_appendable(out)
        rows = []
        for row in tuning_rows(dims, length, precision, repeats):
            rows.append(row)
            append(out, row)
            if as_json:
                typer.echo(json.dumps(row))
        for (capability, head_dim), tile in best_tiles(rows).items():
            typer.echo(f"compute capability {capability}, head_dim {head_dim}: {tile}", err=True)


@app.command()
def host(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "1024,4096",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    repeats: Annotated[int, typer.Option(min=2, help="Measurements of each time.")] = 200,
    out: Annotated[Path, typer.Option(help="JSON lines; rows of a GPU are added, a CPU's are printed alone.")] = RESULTS
    / "host.jsonl",
) -> None:
    """Time what a call costs the CPU before the GPU has its work, for SDPA, dense attention and every selector."""
    with one_line_errors():
        where, precision = resolve_device(device), resolve_dtype(dtype)
        if precision is None:
            raise UsageError("dtype must be bfloat16, float16 or float32, got 'auto'")
        require_kernels(where)
        require_appendable(out)
        for length in parse_lengths(lengths):
            for row in host_rows(length, where, precision, repeats):
                typer.echo(json.dumps(row))
                if where.type == "cuda":
                    append(out, row)


@app.command()
def fit(
    gpu: Annotated[str, typer.Option(help="Part of the GPU's name, as the rows have it.")],
    selector: Annotated[str, typer.Option(help="By name; with its default settings.")] = "flexprefill",
    head_dim: Annotated[int, typer.Option(min=16)] = 128,
    longest: Annotated[int, typer.Option(min=1, help="Tokens: rows of longer prompts are left out.")] = 32768,
    rows: Annotated[Path, typer.Option(help="JSON lines of 'python -m bench attention'.")] = RESULTS
    / "attention.jsonl",
) -> None:
    """Fit the constants of flexprefill_fa/cost_model.py to measured rows, and print them."""
    with one_line_errors():
        chosen = [
            row
            for row in read(rows)
            if gpu in row["gpu"] and row["head_dim"] == head_dim and row["workload"] == "sharpened"
        ]
        for backend in ("FLASH", "TRITON"):
            typer.echo(f"{selector}, {backend}, head_dim {head_dim}: {fit_rates(chosen, selector, backend, longest)}")


@app.command()
def render(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 where a document differs.")
    ] = False,
) -> None:
    """Write the documents' tables and the plots from the rows in bench/results/."""
    with one_line_errors():
        before = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
        after = {document: render_document(document, names, RESULTS) for document, names in DOCUMENTS.items()}
    if check:
        stale = [document.name for document, text in before.items() if after[document] != text]
        if stale:
            what = f"{', '.join(stale)} is not what the rows say: run 'python -m bench render'"
            typer.echo(f"error: {what}", err=True)
            raise typer.Exit(1)
        return
    from bench.plots import (  # takes a second to import, and --check needs none
        draw_accuracy,
        draw_attention,
        draw_fidelity,
        draw_quality,
    )

    for document, text in after.items():
        document.write_text(text, encoding="utf-8")
    draw_attention(RESULTS)
    draw_quality(RESULTS)
    draw_accuracy(RESULTS)
    draw_fidelity(RESULTS)
