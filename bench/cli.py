"""The `python -m bench` command: measure time and quality, tune, fit, render."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.attention import LengthBenchmark
from bench.fit import fit_rates
from bench.host import host_rows
from bench.needle.capture import model_config as needle_config
from bench.paths import RESULTS
from bench.peer_rows import PeerBenchmark
from bench.peers import PEERS, parse_peers
from bench.planning import make_plan
from bench.quality import BACKEND, QualityPlan, quality_rows, sweep
from bench.quality_tables import SETTINGS
from bench.render import DOCUMENTS, draw_plots, render_document
from bench.serve_cli import serve
from bench.shapes import SHAPES
from bench.spec import (
    Backends,
    Device,
    Dtype,
    HeadDim,
    Heads,
    Json,
    KvHeads,
    Layer,
    Lengths,
    Out,
    Repeats,
    Seconds,
    Seed,
    Selectors,
    Workload,
    check_backends,
    parse_lengths,
    parse_place,
    parse_selectors,
    parse_whole,
)
from bench.speed_tables import ATTENTION, DENSITY, GIVEN
from bench.speed_tables import PEERS as PEERS_TABLE
from bench.tables import paragraphs
from bench.terminal import Recorder, one_line_errors
from bench.ttft_tables import ttft_tables
from bench.tune import best_tiles, tuning_rows
from flexprefill_fa import selector_names
from flexprefill_fa.tools.loading import UsageError, require_transformers
from flexprefill_fa.tools.rows import Row, read

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
    lengths: Lengths = _LENGTHS,
    selectors: Selectors = "flexprefill",
    density: Annotated[
        str | None, typer.Option(help="Synthetic selections of these densities instead of selectors.")
    ] = None,
    backends: Backends = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Dtype = "bfloat16",
    workload: Workload = "sharpened",
    layer: Layer = 2,
    device: Device = "auto",
    seed: Seed = 0,
    repeats: Repeats = 20,
    seconds: Seconds = 5.0,
    dense: Annotated[bool, typer.Option(help="Time the dense kernels too.")] = True,
    mean_correction: Annotated[bool, typer.Option(help="Time attention with mean correction too.")] = False,
    out: Out = RESULTS / "attention.jsonl",
    as_json: Json = False,
) -> None:
    """Time selection and attention beside dense attention, on structured inputs, after checking the outputs.

    Exits with 1 if an output was wrong and with 2 if something could not run.
    """
    options = locals()
    with one_line_errors():
        plan = make_plan(**options)
        run = Recorder(out, as_json)

    def measured(length: int) -> Iterator[Row]:
        return LengthBenchmark(plan, length, run.note).rows()

    for length in plan.lengths:
        run.take(f"{length} tokens", plan.steps(), partial(measured, length))
    tables = paragraphs(table.markdown(run.rows) for table in (ATTENTION, DENSITY))
    run.finish(tables, wrong=any("error" in row for row in run.rows))


@app.command()
def quality(
    lengths: Lengths = "8192,32768",
    selectors: Annotated[
        str | None,
        typer.Option(help="Comma-separated; name or name:field=value+field=value. Default: a sweep of every selector."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Of the needle model, comma-separated; all by default.")] = None,
    mean_correction: Annotated[
        bool | None, typer.Option("--mean-correction/--no-mean-correction", help="Both by default.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = RESULTS / "quality.jsonl",
    as_json: Json = False,
) -> None:
    """Compare what selectors keep, and what their outputs lose against exact attention, on a trained model's heads.

    Exits with 1 if a setting failed and with 2 if something could not run.
    """
    failures: list[str] = []

    def failed(line: str) -> None:
        failures.append(line)
        run.note(line)

    with one_line_errors():
        model, configs = needle_config(), parse_selectors("selectors", sweep() if selectors is None else selectors)
        last = model["num_hidden_layers"] - 1
        where, precision = parse_place(device, dtype)
        check_backends([BACKEND[where.type]], precision, model["head_dim"], configs, where)
        plan = QualityPlan(
            configs=configs,
            corrections=(False, True) if mean_correction is None else (mean_correction,),
            layers=list(range(last + 1)) if layers is None else parse_whole("layers", layers, 0, last),
            dtype=precision,
            device=where,
            seed=seed,
        )
        wanted = parse_lengths(lengths)
        run = Recorder(out, as_json)
        for length in wanted:
            run.take(f"{length} tokens", plan.steps(), partial(quality_rows, plan, length, failed))
    run.finish(SETTINGS.markdown(run.rows), wrong=bool(failures))


@app.command()
def ttft(
    config: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    lengths: Lengths = _LENGTHS,
    selectors: Annotated[
        str, typer.Option(help="Run in full, then attention is over random blocks; comma-separated, '' for none.")
    ] = ",".join(selector_names()),
    density: Annotated[float, typer.Option(help="Of those random blocks, in (0, 1].")] = 0.05,
    own: Annotated[
        str, typer.Option(help="Selectors that attend over their own choice, which random weights make senseless.")
    ] = "flexprefill:tau=0+max_budget=2048",
    dense: Annotated[
        str | None, typer.Option(help="Dense kernels, comma-separated, '' for none. Default: all there are.")
    ] = None,
    modes: Annotated[str, typer.Option(help="eager, compiled or both, comma-separated.")] = "eager,compiled",
    chunk: Annotated[
        int | None, typer.Option(min=128, help="Tokens of the prompt at a time; selectors alone. Default: all.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the model, instead of the shape's own.")] = None,
    repeats: Repeats = 5,
    seconds: Seconds = 10.0,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = RESULTS / "ttft.jsonl",
    as_json: Json = False,
) -> None:
    """Time to first token of a model with random weights, peak memory, and what attention and selection take of it.

    Under torchrun the ranks share the model by transformers' tensor parallelism. Exits with 1 if something that was to
    run sparse did not, and with 2 if something could not run.
    """
    options = locals()
    with one_line_errors():
        require_transformers()
        # They need transformers at import, which the other commands do without.
        from bench.ttft import make_plan, ttft_rows
        from bench.ttft_ranks import Ranks

        plan = make_plan(**options)
        with Ranks.start(plan.device) as ranks:
            run = Recorder(out, as_json, quiet=int(os.environ.get("RANK", "0")) > 0)
            run.take(config, len(list(plan.passes())), partial(ttft_rows, plan, ranks, run.note))
    run.incomplete |= any("error" in row for row in run.rows)
    run.finish(ttft_tables(run.rows, []), wrong=not all(row.get("ran_sparse", True) for row in run.rows))


app.command()(serve)


@app.command()
def peers(
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=FOLDER, a checkout whose code is run; may be repeated. Names: {', '.join(PEERS)}."),
    ] = None,
    lengths: Lengths = "4096,16384,65536",
    selectors: Selectors = "flexprefill,flashprefill",
    density: Annotated[
        str | None, typer.Option(help="Attention over the same blocks of these densities, instead of selectors.")
    ] = None,
    backends: Backends = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    dtype: Dtype = "bfloat16",
    workload: Workload = "sharpened",
    layer: Layer = 2,
    device: Device = "auto",
    seed: Seed = 0,
    repeats: Repeats = 20,
    seconds: Seconds = 5.0,
    dense: Annotated[bool, typer.Option(help="Time the dense kernels too.")] = True,
    out: Out = RESULTS / "peers.jsonl",
    as_json: Json = False,
) -> None:
    """Time public implementations beside this package, on the same inputs: their own selections, or given blocks.

    Peers of the same method get the same settings. Without --peer only this package and dense attention are measured.
    Exits with 1 if an output of this package was wrong and with 2 if a peer's was, or something could not run.
    """
    options = locals()
    with one_line_errors():
        found = parse_peers(peer or [])
        plan = make_plan(**options)
        run = Recorder(out, as_json)
    for name in sorted({config.name for config in plan.configs} - {one.selector for one, _ in found}):
        run.note(f"{name} is measured without a peer")
    benches: dict[int, PeerBenchmark] = {}  # their inputs stay in memory for the peers, who come after every length

    def ours(length: int) -> Iterator[Row]:
        bench = PeerBenchmark(plan, length, run.note)
        yield from bench.rows()
        benches[length] = bench

    for length in plan.lengths:
        run.take(f"{length} tokens", plan.steps(), partial(ours, length))
    for length, bench in benches.items():
        for one, folder in found:
            run.take(f"{length} tokens, {one.name}", None, partial(bench.peer_rows, folder, one))
    broken = [row for row in run.rows if "error" in row]
    run.incomplete |= bool(broken)
    tables = paragraphs(table.markdown(run.rows) for table in (PEERS_TABLE, GIVEN))
    run.finish(tables, wrong=any(row["path"] != "peer" for row in broken))


@app.command()
def tune(
    head_dims: Annotated[str, typer.Option(help="Comma-separated.")] = "64,128,256",
    length: Annotated[int, typer.Option(min=1024, help="Tokens.")] = 32768,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    repeats: Repeats = 10,
    out: Out = RESULTS / "tuning.jsonl",
    as_json: Json = False,
) -> None:
    """Try tiles of FlexAttention's Triton kernel on this GPU, for the table in flexprefill_fa/backends.py."""
    with one_line_errors():
        where, precision = parse_place("auto", dtype)
        if precision == torch.float32:
            raise UsageError(f"dtype must be bfloat16 or float16, got {dtype!r}")
        dims = parse_whole("head-dims", head_dims, 16, 256)
        if where.type != "cuda":
            raise UsageError("tiles are tuned on a CUDA GPU, and there is none")
        run = Recorder(out, as_json)
        run.take(f"{length} tokens", None, partial(tuning_rows, dims, length, precision, repeats))
    for (capability, head_dim), tile in best_tiles(run.rows).items():
        run.note(f"compute capability {capability}, head_dim {head_dim}: {tile}")
    run.finish("")


@app.command()
def host(
    lengths: Lengths = "1024,4096",
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(min=2, help="Measurements of each time.")] = 200,
    out: Annotated[Path, typer.Option(help="JSON lines; rows of a GPU are added, a CPU's are printed alone.")] = RESULTS
    / "host.jsonl",
) -> None:
    """Time what a call costs the CPU before the GPU has its work, for SDPA, dense attention and every selector."""
    with one_line_errors():
        where, precision = parse_place(device, dtype)
        wanted = parse_lengths(lengths)
        run = Recorder(out if where.type == "cuda" else None, as_json=True)
        for length in wanted:
            run.take(f"{length} tokens", None, partial(host_rows, length, where, precision, repeats))
    run.finish("")


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
        after = {document: render_document(document, names, RESULTS) for document, names in DOCUMENTS.items()}
    if check:
        stale = [document.name for document, text in after.items() if document.read_text(encoding="utf-8") != text]
        if stale:
            what = f"{', '.join(stale)} is not what the rows say: run 'python -m bench render'"
            typer.echo(f"error: {what}", err=True)
            raise typer.Exit(1)
        return
    for document, text in after.items():
        document.write_text(text, encoding="utf-8")
    draw_plots(RESULTS)
