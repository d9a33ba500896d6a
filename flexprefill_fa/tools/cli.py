"""The `flexprefill` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from flexprefill_fa import __version__, masks
from flexprefill_fa.tools import reporting
from flexprefill_fa.tools.evaluation.cli import evaluate
from flexprefill_fa.tools.fidelity.cli import fidelity
from flexprefill_fa.tools.inspection.output import check_out, write_atomically
from flexprefill_fa.tools.inspection.place import parse_place
from flexprefill_fa.tools.loading import (
    UsageError,
    load_model,
    one_line_errors,
    read_prompt,
    require_kernels,
    resolve_device,
    resolve_dtype,
)
from flexprefill_fa.tools.options import (
    SELECTOR_FIELDS,
    Device,
    Dtype,
    Json,
    Model,
    PromptFile,
    Repeats,
    Selected,
    selector_options,
)
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.rows import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flexprefill_fa.tools.demo import Answer
    from flexprefill_fa.tools.generation import Measurement

app = typer.Typer(
    help="Block-sparse prefill attention for long prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Block-sparse prefill attention for long prompts."""
    if show_version:
        typer.echo(f"flexprefill {__version__}")
        raise typer.Exit


@app.command()
@selector_options("gamma", "tau", "min_budget")
def demo(
    *,
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 16384,
    needles: Annotated[int, typer.Option(help="How many numbers are hidden in it.")] = 8,
    seed: Annotated[int, typer.Option(help="Chooses the source text, the numbers and their places.")] = 0,
    selected: Selected,
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, bfloat16 on a GPU) or as named.")] = "auto",
    device: Device = "auto",
    repeats: Repeats = 1,
    as_json: Json = False,
) -> None:
    """Find a number hidden in a long prompt, with dense and with sparse prefill.

    Exits with 0 only if both answers are right.
    """
    from flexprefill_fa.tools.demo import run_demo

    with one_line_errors():
        config = selected.config
        where, weights = resolve_device(device), resolve_dtype(dtype)
        require_kernels(where)
        result = run_demo(
            config,
            mean_correction=False if selected.chosen else "auto",
            tokens=tokens,
            needles=needles,
            seed=seed,
            dtype=weights,
            device=where,
            progress=WorkProgress(),
            repeats=repeats,
        )
    dense, sparse = result.dense, result.sparse
    both_right = dense.correct and sparse.correct
    conditions = reporting.conditions(where, result.dtype)
    prompt = {"tokens": tokens, "needles": needles, "seed": seed, "key": result.key, "answer": result.expected}
    if as_json:
        report = {"kind": "demo", "prompt": prompt, **reporting.selector_settings(config), **conditions}
        report["mean_correction"] = result.mean_correction
        report |= environment(where)
        for name, answer in (("dense", dense), ("sparse", sparse)):
            fields = reporting.measurement_fields(answer.measurement)
            report[name] = {"answer": answer.text, "correct": answer.correct, **fields}
        report["speedup"] = reporting.speedup(dense.measurement, sparse.measurement)
        report["ok"] = both_right
        typer.echo(json.dumps(report))
    else:
        console = Console(highlight=False)
        console.print(
            f"{tokens} tokens of Python source with {needles} hidden numbers; {result.key} is {result.expected}."
        )
        answers = {"dense": _verdict(dense), "sparse": _verdict(sparse)}
        title = f"{reporting.selector_text(config, result.mean_correction)}, {_title(conditions)}"
        console.print(reporting.result_table(title, sparse.measurement, dense.measurement, answers))
        _print_layers(console, sparse.measurement, tokens, config)
    raise typer.Exit(0 if both_right else 1)


@app.command()
@selector_options(*SELECTOR_FIELDS)
def generate(
    model: Model,
    prompt_file: PromptFile,
    *,
    selected: Selected,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    compare: Annotated[str | None, typer.Option(help="'dense' answers with dense prefill too.")] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure recall: one more prefill, with exact attention.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    repeats: Repeats = 1,
    as_json: Json = False,
) -> None:
    """Continue a prompt with sparse prefill, greedily, with any local Hugging Face model.

    The text goes to stdout, the measurements to stderr. Options of the selector default to its own settings.
    """
    with one_line_errors():
        if compare not in (None, "dense"):
            raise UsageError(f"compare must be dense, got {compare!r}")
        config = selected.config
        where, weights = resolve_device(device), resolve_dtype(dtype)
        progress = WorkProgress()
        network, tokenizer, input_ids = _model_and_prompt(
            model, prompt_file, weights, where, progress, new_tokens=max_new_tokens
        )
        from flexprefill_fa.tools.generation import measure_dense, measure_sparse

        correction = selected.correction(network)
        tokens = input_ids.shape[1]
        sparse = measure_sparse(
            network,
            input_ids,
            config,
            max_new_tokens,
            progress,
            mean_correction=correction,
            repeats=repeats,
            recall=recall,
        )
        dense = measure_dense(network, input_ids, max_new_tokens, progress, repeats=repeats) if compare else None
    sparse_text, dense_text = (
        str(tokenizer.decode(m.token_ids, skip_special_tokens=True)) if m else "" for m in (sparse, dense)
    )
    conditions = reporting.conditions(where, network.dtype)
    if as_json:
        report = {"model": model, "prompt": {"tokens": tokens}, **reporting.selector_settings(config), **conditions}
        report["mean_correction"] = correction
        report["sparse"] = {"text": sparse_text, **reporting.measurement_fields(sparse)}
        if dense:
            report["dense"] = {"text": dense_text, **reporting.measurement_fields(dense)}
            report["same_tokens"] = sparse.token_ids == dense.token_ids
            report["speedup"] = reporting.speedup(dense, sparse)
        typer.echo(json.dumps(report))
        return
    typer.echo(sparse_text)
    console = Console(stderr=True, highlight=False)
    title = f"{tokens} tokens, {reporting.selector_text(config, correction)}, {_title(conditions)}"
    console.print(reporting.result_table(title, sparse, dense))
    _print_layers(console, sparse, tokens, config)
    if dense:
        same = sparse.token_ids == dense.token_ids
        console.print("Dense prefill gives the same tokens." if same else "Dense prefill gives other tokens:")
        if not same:
            console.print(dense_text, markup=False)


@app.command("inspect")
@selector_options(*SELECTOR_FIELDS)
def inspect_heads(
    model: Model,
    prompt_file: PromptFile,
    *,
    out: Annotated[Path | None, typer.Option(help="The page to write, such as report.html.")] = None,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Print why key blocks are kept: LAYER,HEAD,QUERY_BLOCK for all that a query block keeps, or "
            "LAYER,HEAD,QUERY_BLOCK,KEY_BLOCK; all counted from 0.",
        ),
    ] = None,
    selected: Selected,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Show what every layer and head keeps of a prompt, and what it misses, in one HTML page; or why, as text.

    The page holds everything it shows and loads nothing. Exact attention is computed beside sparse prefill: slow.
    """
    with one_line_errors():
        if out is None and why is None:
            raise UsageError("inspect needs --out for a page, --why for text, or both")
        place = None if why is None else parse_place(why)
        config = selected.config
        where, weights = resolve_device(device), resolve_dtype(dtype)
        if out is not None:
            check_out(out, prompt_file)
        progress = WorkProgress()
        network, _, input_ids = _model_and_prompt(model, prompt_file, weights, where, progress)
        from flexprefill_fa.tools.inspection.collect import inspect_prefill
        from flexprefill_fa.tools.inspection.page import render
        from flexprefill_fa.tools.inspection.why import explain_place

        correction = selected.correction(network)
        if place is not None:
            for line in explain_place(network, input_ids, config, progress, correction, place):
                typer.echo(line)
        if out is None:
            return
        found = inspect_prefill(network, input_ids, config, progress, correction)
        about = reporting.inspection_facts(model, prompt_file, config, reporting.conditions(where, network.dtype))
        about["mean correction"] = str(correction or "none")
        page = render(found, about)
        write_atomically(out, page)
    typer.echo(
        f"{out}: {len(found.heads)} heads in {len(found.maps)} of {len(found.layers)} layers, density "
        f"{found.density:.3f}, recall {found.recall:.3f}, {len(page) / 2**20:.1f} MiB"
    )


def _model_and_prompt(
    model: str,
    prompt_file: str,
    weights: torch.dtype | None,
    where: torch.device,
    progress: WorkProgress,
    new_tokens: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor]:
    """The model, its tokenizer and the prompt's tokens `[1, n]`; warns where the model has too few positions."""
    require_kernels(where)
    text = read_prompt(prompt_file)
    with progress.task("loading the model"):
        network, tokenizer = load_model(model, weights, where)
    from flexprefill_fa.tools.generation import encode

    input_ids = encode(tokenizer, text, where)
    needed = input_ids.shape[1] + new_tokens
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and needed > limit:
        what = "prompt and answer take up to" if new_tokens else "the prompt takes"
        _warn(f"{what} {needed} tokens, the model was made for {limit}")
    return network, tokenizer, input_ids


app.command("eval")(evaluate)
app.command("fidelity")(fidelity)


def _warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def _title(conditions: dict[str, Any]) -> str:
    return f"{conditions['processor']}, {conditions['dtype']}, torch {conditions['torch']}"


def _verdict(answer: Answer) -> Text:
    return Text(f"{answer.text} {'right' if answer.correct else 'wrong'}", style="green" if answer.correct else "red")


def _print_layers(console: Console, sparse: Measurement, tokens: int, config: masks.Selector) -> None:
    if sparse.layers:
        console.print(reporting.layer_table(sparse))
    else:
        console.print(
            f"Every block was kept: prompts of up to {config.dense_tokens} tokens run dense, this has {tokens}."
        )
