"""`flexprefill fidelity`: what a setting of a selector costs a model, and the setting for what it may cost."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flexprefill_fa.choice import Choice, parse_choice
from flexprefill_fa.masks import DEFAULT_SELECTOR
from flexprefill_fa.tools.fidelity import memory
from flexprefill_fa.tools.fidelity.findings import Aims, Findings
from flexprefill_fa.tools.fidelity.plot import draw, require_matplotlib
from flexprefill_fa.tools.fidelity.table import row_line, table
from flexprefill_fa.tools.fidelity.texts import read_tokens
from flexprefill_fa.tools.inspection.output import check_out
from flexprefill_fa.tools.loading import (
    UsageError,
    first_line,
    load_config,
    load_model,
    load_tokenizer,
    model_name,
    one_line_errors,
    require_kernels,
    resolve_device,
    resolve_dtype,
    token_count,
)
from flexprefill_fa.tools.options import USUAL, Device, Dtype, Model
from flexprefill_fa.tools.progress import WorkProgress
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, rows_before

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def fidelity(
    model: Model,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            help="name or name:field=value+field=value, where mean_correction=tilted and dense_layers=0/4 are fields "
            f"too. May be repeated; default: {USUAL}."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of text, comma-separated.")] = "4096",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of UTF-8 text, - for standard input. May be repeated; default: source code and prose that "
            "come with Python."
        ),
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(help="Find each selector's sparsest setting whose KL is at most this on every text, in nats."),
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(help="Layers that stay dense, such as 0,4; auto finds out which are worth it at equal density."),
    ] = None,
    mean_correction: Annotated[
        bool, typer.Option("--mean-correction", help="Let dropped blocks count by their means, in every selector.")
    ] = False,
    recall: Annotated[
        bool | None,
        typer.Option(
            help="Measure recall too: one more pass, with exact attention (slow). Default: up to 2^32 causal scores of "
            "all layers and heads on the CPU, 2^38 on a GPU."
        ),
    ] = None,
    skip: Annotated[int, typer.Option(min=0, help="First positions of a text that do not count.")] = 512,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens read at once, as serving engines do; default: all.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="JSON lines; rows are added, and those that are there are not measured again.")
    ] = Path("fidelity.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="A PNG to draw: KL against density.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over all GPUs: auto, balanced, balanced_low_0 or sequential.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout, all else on stderr.")] = False,
) -> None:
    """Measure how far sparse prefill moves a model's next-token distributions from dense, on the same text.

    Each row says what a setting keeps (density) and loses: KL(dense || sparse), loss, share of equal top tokens. Rows
    are kept as they are finished: the same command goes on where it was stopped. Exits with 2 if a target was not
    reached or a cell could not be measured.
    """
    console = Console(file=sys.stderr, highlight=False)  # this stderr, whatever is redirected meanwhile
    rows: list[Row] = []

    def finished(row: Row) -> None:
        append(out, row)
        rows.append(row)
        console.print(row_line(row), markup=False, soft_wrap=True)
        if as_json:
            typer.echo(json.dumps(row))

    with one_line_errors():
        choices = _choices(selector or [DEFAULT_SELECTOR], mean_correction, dense_layers)
        numbers = _numbers(lengths, skip)
        aims = Aims(target_kl, dense_layers == "auto")
        aims.check(choices, numbers)
        if device_map is not None and (device_map not in _MAPS or device != "auto"):
            raise UsageError(f"device-map must be one of {', '.join(_MAPS)}, without --device, got {device_map!r}")
        where, precision = resolve_device(device), resolve_dtype(dtype)
        require_kernels(where)
        before = rows_before(out)
        if plot is not None:
            check_out(plot, "-")
            require_matplotlib()
        progress = WorkProgress(console)
        with progress.task("reading the text"):
            tokenizer, config = load_tokenizer(model), load_config(model)
            limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
            if limit is not None and numbers[-1] > limit:
                raise UsageError(f"lengths must be at most {limit}, the positions of {model}, got {numbers[-1]}")
            texts = read_tokens(tokenizer, text or (), numbers[-1])
        needed = memory.estimate(model, config, precision, where, numbers[-1], len(texts), chunk)
        needed.check(memory.free_bytes(where, spread=device_map is not None), str(where))
        console.print(f"memory: {needed.text()}", markup=False, soft_wrap=True)
        with progress.task("loading the model"):
            network, _ = load_model(model, precision, where, device_map)
        from flexprefill_fa.tools.fidelity.cells import Conditions, Fidelity
        from flexprefill_fa.tools.generation import usual_correction

        if selector is None and not mean_correction:
            correction = usual_correction(network)
            choices = [dataclasses.replace(one, mean_correction=correction) for one in choices]
        with progress.task("reading the weights for their hash"):
            conditions = Conditions(skip, chunk, recall)
            runner = Fidelity(network, model, model_name(model), texts, conditions, before, finished)
        for choice in choices:
            runner.check(choice)
        findings = Findings(runner, aims, model)
        try:
            steps = len(choices) * len(numbers)
            with progress.task(f"{len(texts)} texts, {len(choices)} selectors, {lengths} tokens", steps) as advance:
                for length in numbers:
                    for choice in choices:
                        findings.add(choice, length)
                        if advance is not None:
                            advance()
        except KeyboardInterrupt as error:
            stopped = f"stopped: {len(rows)} new rows are in {out}; the same command goes on from there"
            console.print(stopped, markup=False, soft_wrap=True)
            raise typer.Exit(130) from error
        except torch.OutOfMemoryError as error:
            raise UsageError(f"{first_line(error)} ({len(rows)} new rows are kept in {out})") from error
        wanted = [list(choice.dense_layers) for choice in choices]
        drawn = [row for row in runner.rows if row["dense_layers"] in wanted]
        if plot is not None and drawn:
            draw(drawn, plot)
    shown = open_console(stderr=as_json)
    if runner.rows:
        shown.print(table(runner.rows))
    if old := len(runner.rows) - len(rows):
        changed = (
            "; if code that is not committed has changed, delete them" if "-dirty" in runner.rows[0]["commit"] else ""
        )
        shown.print(f"{old} of {len(runner.rows)} rows were in {out} already{changed}", markup=False, soft_wrap=True)
    for advice in findings.advice:
        shown.print(advice.text(), markup=False, soft_wrap=True)
        if as_json:
            typer.echo(json.dumps(advice.fields()))
    for line in findings.failures:
        typer.echo(f"error: {line}", err=True)
    if findings.failures:
        raise typer.Exit(2)


def _choices(specs: Sequence[str], mean_correction: bool, dense_layers: str | None) -> list[Choice]:
    """The settings to measure, each once; options that concern all selectors beside those in the specs."""
    layers: tuple[int, ...] | None = None
    if dense_layers not in (None, "auto"):
        if not re.fullmatch(r"-?\d+([,/]-?\d+)*", dense_layers):
            raise UsageError(f"dense-layers must be auto or layer indices such as 0,4, got {dense_layers!r}")
        layers = tuple(sorted({int(layer) for layer in re.split("[,/]", dense_layers)}))
    found: dict[Choice, None] = {}
    for spec in specs:
        choice = parse_choice(spec)
        if choice.config is None:
            raise UsageError("selector dense is what all others are compared with: it is measured in any case")
        if layers is not None and choice.dense_layers:
            raise UsageError(f"dense layers are given twice, as an option and in selector {spec!r}")
        if mean_correction and choice.mean_correction == "tilted":
            raise UsageError(f"mean correction is given twice, as an option and in selector {spec!r}")
        choice = dataclasses.replace(
            choice,
            mean_correction=choice.mean_correction or mean_correction,
            dense_layers=choice.dense_layers if layers is None else layers,
        )
        found[choice] = None
    return list(found)


def _numbers(lengths: str, skip: int) -> list[int]:
    """The lengths, ascending."""
    numbers = sorted({token_count(item.strip()) for item in lengths.split(",")})
    if numbers[0] < skip + 2:
        raise UsageError(
            f"lengths must be at least {skip + 2} tokens, the first {skip} of which do not count (--skip), "
            f"got {numbers[0]}"
        )
    return numbers
