"""`python -m bench ttft`: time to first token of a whole model, with dense and with sparse prefill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.attention import DENSE_KERNELS
from bench.memory import free_bytes, prefill_bytes, shortage
from bench.paths import RESULTS
from bench.planning import backends_of
from bench.shapes import SHAPES, head_dim, model_config
from bench.spec import parse_lengths, parse_list, parse_selector
from bench.terminal import one_line_errors, plain
from bench.ttft_tables import ttft_line, ttft_tables
from flexprefill_fa import selector_names
from flexprefill_fa.tools.loading import (
    UsageError,
    require_kernels,
    require_transformers,
    resolve_device,
    resolve_dtype,
)
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, append, require_appendable

_LENGTHS = "4096,8192,16384,32768,65536,131072,262144"
_SELECTORS = ",".join(selector_names())


def ttft(
    config: Annotated[
        str, typer.Option(help=f"Shape of the model: {', '.join(SHAPES)} or a folder with a config.json.")
    ] = "llama-3.1-8b",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = _LENGTHS,
    selectors: Annotated[
        str, typer.Option(help="Run in full, then attention is over random blocks; comma-separated, '' for none.")
    ] = _SELECTORS,
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
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each row.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Fewer passes where they would take longer.")] = 10.0,
    once_from: Annotated[
        int, typer.Option(min=1, help="Tokens from which on a dense kernel gets one pass, uncompiled, not warmed up.")
    ] = 262144,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[
        str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or, without torchrun, cuda:N.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, prompts and random blocks.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are added.")] = RESULTS / "ttft.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")] = False,
) -> None:
    """Time to first token of a model with random weights, peak memory, and what attention and selection take of it.

    Under torchrun the ranks share the model by transformers' tensor parallelism. Exits with 1 if something that was to
    run sparse did not, and with 2 if something could not run.
    """
    rank = int(os.environ.get("RANK", "0"))
    tell = plain(open_console(stderr=True))

    def note(line: str) -> None:
        if rank == 0:
            tell(line)

    rows: list[Row] = []
    with one_line_errors():
        require_transformers()
        # They need transformers at import, which the other commands do without.
        from bench.ttft import Attention, TtftPlan, check_lengths, ttft_rows
        from bench.ttft_ranks import Ranks

        shape = model_config(config, layers)
        if not 0 < density <= 1:
            raise UsageError(f"density must be in (0, 1], got {density:g}")
        where, precision = resolve_device(device), resolve_dtype(dtype)
        if precision is None:
            raise UsageError("dtype must be bfloat16, float16 or float32, got 'auto'")
        require_kernels(where)
        kernels = _kernels(dense, chunk, where, precision, head_dim(shape))
        attentions = [Attention(kernel=kernel) for kernel in kernels]
        for option, text, share in (("selectors", selectors, density), ("own", own, None)):
            specs = parse_list(option, text) if text else []
            attentions += [Attention(config=parse_selector(spec), density=share) for spec in specs]
        if not attentions:
            raise UsageError("there is nothing to measure: give selectors, own or dense")
        plan = TtftPlan(
            shape=config,
            config=shape,
            lengths=parse_lengths(lengths),
            attentions=attentions,
            modes=_modes(modes),
            chunk=chunk,
            repeats=repeats,
            seconds=seconds,
            once_from=once_from,
            dtype=precision,
            seed=seed,
        )
        check_lengths(plan)
        with Ranks.start(where) as ranks:
            free = ranks.least(free_bytes(ranks.device))
            for length in plan.lengths:
                needed = prefill_bytes(shape, length, chunk, precision, ranks.device, ranks.world_size)
                if problem := shortage(needed * ranks.sharing_memory, free):
                    raise UsageError(f"{length} tokens: {problem}")
            if rank == 0:
                require_appendable(out)
            for row in ttft_rows(plan, ranks, note):
                rows.append(row)
                note(ttft_line(row))
                if rank == 0:
                    append(out, row)
                    if as_json:
                        typer.echo(json.dumps(row))
    if rank == 0:
        typer.echo(ttft_tables(rows, []), err=as_json)
    if not all(row.get("ran_sparse", True) for row in rows):
        raise typer.Exit(1)
    if any("error" in row for row in rows):
        raise typer.Exit(2)


def _modes(text: str) -> tuple[bool, ...]:
    """Whether the model is compiled, for each mode.

    Raises:
        UsageError: for an unknown mode.
    """
    names = parse_list("modes", text)
    for name in names:
        if name not in ("eager", "compiled"):
            raise UsageError(f"modes must be of eager, compiled, got {name!r}")
    return tuple(mode == "compiled" for mode in ("eager", "compiled") if mode in names)


def _kernels(dense: str | None, chunk: int | None, device: torch.device, dtype: torch.dtype, dim: int) -> list[str]:
    """The dense kernels to measure.

    Raises:
        UsageError: for one that is not there, or any of them on a prompt in chunks.
    """
    if chunk is not None:
        if dense:
            raise UsageError("dense attention of a chunk needs a mask of its queries and all keys: leave out dense")
        return []
    sdpa = [kernel for kernel in DENSE_KERNELS[device.type] if kernel.startswith("sdpa")]
    there = [*sdpa, *backends_of(device, dtype, dim)[1:]]
    if dense is None:
        return there
    wanted = parse_list("dense", dense) if dense else []
    for kernel in wanted:
        if kernel not in there:
            raise UsageError(f"dense must be of {', '.join(there)}, got {kernel!r}")
    return wanted
