"""The `python -m bench` command: measure time and quality, tune, fit, render."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from bench import RESULTS
from bench.attention import LengthBenchmark
from bench.gpu_constants import best_tiles, fit_rates, tuning_rows
from bench.host import host_rows, prefill_rows
from bench.models import SHAPES, Ranks
from bench.peer_rows import PeerBenchmark
from bench.peers import PEERS, parse_peers
from bench.planning import Plan
from bench.quality import LAYERS, quality_rows, sweep
from bench.quality_tables import SETTINGS
from bench.render import DOCUMENTS, draw_plots, render_document
from bench.serve import LoadPlan, load_rows
from bench.serve_tables import ENGINES, serve_tables
from bench.spec import parse_lengths, parse_place, parse_share, takes
from bench.speed_tables import ATTENTION, GIVEN
from bench.speed_tables import PEERS as PEERS_TABLE
from bench.tables import paragraphs
from bench.terminal import Recorder, one_line_errors
from bench.ttft_tables import FIRST_TOKEN
from flexprefill_fa import selector_names
from flexprefill_fa.tools.loading import UsageError, first_line, require_transformers
from flexprefill_fa.tools.rows import Row, read


class OneLineErrors(TyperGroup):
    """Commands whose mistakes are told in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=OneLineErrors,
    help="Benchmarks. Their rows go to bench/results/, and the tables of the README and docs/ are rendered from those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_RUN = "dtype device seed out as_json"
_INPUTS = f"backends heads kv_heads head_dim workload model text layer dense repeats seconds {_RUN}"
_EVERY, _BOTH = ",".join(selector_names()), "flexprefill,flashprefill"


@app.command()
@takes(f"lengths selectors density {_INPUTS}", out="attention")
def attention(
    mean_correction: Annotated[bool, typer.Option(help="Time attention with mean correction too.")] = False,
    **given: Any,
) -> None:
    """Time selection and attention beside dense attention, on structured inputs, after checking the outputs.

    Exits with 1 if an output was wrong and with 2 if something could not run.
    """
    plan = Plan(mean_correction=mean_correction, **given)
    run = Recorder(given["out"], given["as_json"])
    run.each(plan.lengths, plan.steps(), lambda length: LengthBenchmark(plan, length, run.note).rows())
    run.wrong = any("error" in row for row in run.rows)
    run.finish(paragraphs(table.markdown(run.rows) for table in (ATTENTION, GIVEN)))


@app.command()
@takes(f"lengths selectors {_RUN}", lengths="8192,32768", selectors=None, out="quality")
def quality(
    mean_correction: Annotated[
        bool | None, typer.Option("--mean-correction/--no-mean-correction", help="Both by default.")
    ] = None,
    **given: Any,
) -> None:
    """Compare what selectors keep, and what their outputs lose against exact attention, on a trained model's heads.

    Without --selectors every selector is swept. Exits with 1 if a setting failed and with 2 if something could not run.
    """
    corrections = (False, True) if mean_correction is None else (mean_correction,)
    backend = "TRITON" if parse_place(given["device"], given["dtype"])[0].type == "cuda" else "CPU"
    selectors = given["selectors"] or sweep()
    plan = Plan(**given | {"selectors": selectors, "workload": "needle", "backends": backend})
    run = Recorder(given["out"], given["as_json"])
    steps = LAYERS * len(plan.configs) * len(corrections)
    run.each(plan.lengths, steps, partial(quality_rows, plan, corrections, run.failed))
    run.finish(SETTINGS.markdown(run.rows))


@app.command()
@takes(f"lengths selectors repeats seconds {_RUN}", selectors=_EVERY, repeats=5, seconds=10.0, out="ttft")
def ttft(
    config: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    density: Annotated[float, typer.Option(help="Of the random blocks, in (0, 1].")] = 0.05,
    dense: Annotated[
        str | None, typer.Option(help="Dense kernels, comma-separated, '' for none. Default: all there are.")
    ] = None,
    modes: Annotated[str, typer.Option(help="eager, compiled or both, comma-separated.")] = "eager,compiled",
    chunk: Annotated[
        int | None, typer.Option(min=128, help="Tokens of the prompt at a time; selectors alone. Default: all.")
    ] = None,
    **given: Any,
) -> None:
    """Time to first token of a model with random weights, peak memory, and what attention and selection take of it.

    Selectors run in full, then attention is over random blocks; '' for none. Under torchrun the ranks share the model
    by transformers' tensor parallelism. Exits with 1 if something that was to run sparse did not, and with 2 if
    something could not run.
    """
    options = {name: value for name, value in locals().items() if name != "given"} | given
    require_transformers()
    # They need transformers at import, which the other commands do without.
    from bench.ttft import TtftPlan, ttft_rows

    left_out: list[str] = []
    plan = TtftPlan(left_out.append, **options)
    with Ranks.start(plan.device) as ranks:
        run = Recorder(given["out"], given["as_json"], quiet=ranks.rank > 0)
        for line in left_out:
            run.note(line)
        run.take(config, len(plan.passes), partial(ttft_rows, plan, ranks, run.note))
    run.incomplete |= any("error" in row for row in run.rows)
    run.wrong = not all(row.get("ran_sparse", True) for row in run.rows)
    run.finish(FIRST_TOKEN.markdown(run.rows))


@app.command()
@takes("lengths repeats as_json", lengths="4096,16384,65536,131072", repeats=7)
def serve(
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    settings: Annotated[str, typer.Option(help="Of the backend, as a JSON object.")] = "{}",
    density: Annotated[float, typer.Option(help="Of the blocks that the sparse engine attends over.")] = 0.05,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines; rows are added. Default: bench/results/ENGINE.jsonl.")
    ] = None,
    **given: Any,
) -> None:
    """Time to first token and throughput of an engine's default backend and of sparse prefill, random weights.

    The repeats are of each prompt below 64K tokens; longer ones get a third. Exits with 2 if something could not run.
    """
    try:
        chosen = json.loads(settings)
    except ValueError as error:
        raise UsageError(f"settings must be a JSON object, got {settings!r}: {first_line(error)}") from error
    if not isinstance(chosen, dict):
        raise UsageError(f"settings must be a JSON object, got {settings!r}")
    share = parse_share("density", f"{density:g}")
    plan = LoadPlan(parse_lengths(given["lengths"]), chosen, share, given["repeats"], engine)
    title = ENGINES[engine].title
    if not torch.cuda.is_available():
        raise UsageError(f"{title} is measured on a CUDA GPU, and there is none")
    if importlib.util.find_spec(engine) is None:
        raise UsageError(f"{title} is not installed: pip install 'flexprefill-fa[{engine}]'")
    run = Recorder(out or RESULTS / f"{engine}.jsonl", given["as_json"])
    run.take(title, None, partial(load_rows, plan, run.note))
    run.finish(serve_tables(run.rows))


@app.command()
@takes(f"lengths selectors density {_INPUTS}", lengths="4096,16384,65536", selectors=_BOTH, out="peers")
def peers(
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=FOLDER, a checkout whose code is run; may be repeated. Names: {', '.join(PEERS)}."),
    ] = None,
    **given: Any,
) -> None:
    """Time public implementations beside this package, on the same inputs: their own selections, or given blocks.

    Peers of the same method get the same settings. Without --peer only this package and dense attention are measured.
    Exits with 1 if an output of this package was wrong and with 2 if a peer's was, or something could not run.
    """
    found = parse_peers(peer or [])
    plan = Plan(**given)
    run = Recorder(given["out"], given["as_json"])
    for name in sorted({config.name for config in plan.configs} - {one.selector for one, _ in found}):
        run.note(f"{name} is measured without a peer")
    for one in (one for one, _ in found if one.adapter is None and not plan.densities):
        run.note(f"{one.name} selects nothing itself: it is measured over given blocks, with --density")
    benches: dict[int, PeerBenchmark] = {}  # their inputs stay in memory for the peers, who come after every length

    def ours(length: int) -> Iterator[Row]:
        bench = PeerBenchmark(plan, length, run.note)
        yield from bench.rows()
        benches[length] = bench

    run.each(plan.lengths, plan.steps(), ours)
    for length, bench in benches.items():
        for one, folder in found:
            run.take(f"{length} tokens, {one.name}", None, partial(bench.peer_rows, folder, one))
    broken = [row for row in run.rows if "error" in row]
    run.incomplete |= bool(broken)
    run.wrong = any(row["path"] != "peer" for row in broken)
    run.finish(paragraphs(table.markdown(run.rows) for table in (PEERS_TABLE, GIVEN)))


@app.command()
@takes("out as_json", out="tuning")
def tune(**given: Any) -> None:
    """Try tiles of FlexAttention's Triton kernel on this GPU, for the table in flexprefill_fa/backends.py."""
    if not torch.cuda.is_available():
        raise UsageError("tiles are tuned on a CUDA GPU, and there is none")
    run = Recorder(given["out"], given["as_json"])
    run.take("tiles", None, tuning_rows)
    for (capability, head_dim), tile in best_tiles(run.rows).items():
        run.note(f"compute capability {capability}, head_dim {head_dim}: {tile}")
    run.finish("")


@app.command()
@takes("lengths repeats dtype device out", lengths="1024,4096", repeats=200, out="host")
def host(
    prefill: Annotated[bool, typer.Option(help="Whole prefills of the needle model in transformers instead.")] = False,
    **given: Any,
) -> None:
    """Time what a call costs the CPU before the GPU has its work, for SDPA, dense attention and every selector.

    Rows of a GPU are added, a CPU's are printed alone.
    """
    where, precision = parse_place(given["device"], given["dtype"])
    run = Recorder(given["out"] if where.type == "cuda" else None, as_json=True)
    rows = partial(prefill_rows if prefill else host_rows, where, precision, given["repeats"])
    run.each(parse_lengths(given["lengths"]), None, rows)
    run.finish("")


@app.command()
def fit(
    gpu: Annotated[str, typer.Option(help="Part of the GPU's name, as the rows have it.")],
    selector: Annotated[str, typer.Option(help="By name; with its default settings.")] = "flexprefill",
    head_dim: Annotated[int, typer.Option(min=16)] = 128,
) -> None:
    """Fit the constants of flexprefill_fa/cost_model.py to the rows of 'attention', and print them."""
    same = {"head_dim": head_dim, "workload": "sharpened"}
    chosen = [row for row in read(RESULTS / "attention.jsonl") if gpu in row["gpu"] and row | same == row]
    for backend in ("FLASH", "TRITON"):
        typer.echo(f"{selector}, {backend}, head_dim {head_dim}: {fit_rates(chosen, selector, backend)}")


@app.command()
def render(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 where a document differs.")
    ] = False,
) -> None:
    """Write the documents' tables and the plots from the rows in bench/results/."""
    after = {document: render_document(document, names, RESULTS) for document, names in DOCUMENTS.items()}
    stale = [document for document, text in after.items() if document.read_text(encoding="utf-8") != text]
    if check and stale:
        names = ", ".join(document.name for document in stale)
        typer.echo(f"error: {names} is not what the rows say: run 'python -m bench render'", err=True)
        raise typer.Exit(1)
    if not check:
        for document in stale:
            document.write_text(after[document], encoding="utf-8")
        draw_plots(RESULTS)
