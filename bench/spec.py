"""The options of `python -m bench`, each described once, and what their values mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexprefill_fa.backends import flash_problem, resolve_backend
from flexprefill_fa.choice import make_config, selector_spec
from flexprefill_fa.tools.loading import UsageError, require_kernels, resolve_device, resolve_dtype, token_count

WORKLOADS = ("sharpened", "fixed", "needle")
"""Structured heads that get sharper with length, structured heads that do not, and a layer of the needle model."""

Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")]
Selectors = Annotated[str, typer.Option(help="Comma-separated; name or name:field=value+field=value.")]
Backends = Annotated[str | None, typer.Option(help="Default: auto and what the device has of FLASH, TRITON and CPU.")]
Heads = Annotated[int | None, typer.Option(min=1, help="Query heads, 32 by default.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key and value heads, 8 by default.")]
HeadDim = Annotated[int | None, typer.Option(min=16, help="128 by default.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Workload = Annotated[str, typer.Option(help=f"One of {', '.join(WORKLOADS)}.")]
Layer = Annotated[int, typer.Option(min=0, help="Of the needle model, for that workload.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N (not under torchrun).")]
Seed = Annotated[int, typer.Option(min=0, help="Of inputs, weights, prompts and random blocks.")]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each time.")]
Seconds = Annotated[float, typer.Option(min=0, help="Fewer repeats where they would take longer.")]
Out = Annotated[Path, typer.Option(help="JSON lines; rows are added.")]
Json = Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")]


def parse_list(option: str, text: str) -> list[str]:
    """The items of a comma-separated list, each once.

    Raises:
        UsageError: for an empty list or item, or one that comes twice.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UsageError(f"{option} must be a comma-separated list, got {text!r}")
    twice = sorted({item for item in items if items.count(item) > 1})
    if twice:
        raise UsageError(f"{option} must name each item once, got {', '.join(twice)} more than once")
    return items


def parse_lengths(text: str) -> list[int]:
    """Prompt lengths in tokens, ascending.

    Raises:
        UsageError: for anything but whole numbers from 1.
    """
    return sorted(token_count(item) for item in parse_list("lengths", text))


def parse_whole(option: str, text: str, least: int, most: int) -> list[int]:
    """Whole numbers, ascending.

    Raises:
        UsageError: for anything but whole numbers in [least, most].
    """
    items = parse_list(option, text)
    for item in items:
        if not item.isdecimal() or not least <= int(item) <= most:
            raise UsageError(f"{option} must be whole numbers in [{least}, {most}], got {item!r}")
    return sorted(map(int, items))


def parse_share(option: str, text: str) -> float:
    """A share.

    Raises:
        UsageError: for anything but a number in (0, 1].
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise UsageError(f"{option} must be in (0, 1], got {text}")
    return number


def parse_selector(spec: str) -> Any:
    """The config of `name` or `name:field=value+field=value`, by the selector's own fields.

    Raises:
        UsageError: for an unknown selector or field, a malformed pair, or a value that the selector refuses.
    """
    name, options = selector_spec(spec)
    return make_config(name, **options)


def parse_selectors(option: str, text: str) -> list[Any]:
    """The configs of a list, see `parse_selector`; none for no text."""
    return [parse_selector(spec) for spec in parse_list(option, text)] if text else []


def parse_place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where something runs, and in which precision.

    Raises:
        UsageError: for a device or dtype that cannot be had.
    """
    where, precision = resolve_device(device), resolve_dtype(dtype)
    if precision is None:
        raise UsageError("dtype must be bfloat16, float16 or float32, got 'auto'")
    require_kernels(where)
    return where, precision


def backends_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """What there is to measure: FLASH only where it runs."""
    if device.type == "cpu":
        return ["auto", "CPU"]
    problem = flash_problem(torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), 128)
    if problem is None:
        return ["auto", "FLASH", "TRITON"]
    typer.echo(f"without FLASH: {problem}", err=True)
    return ["auto", "TRITON"]


def check_backends(
    backends: Sequence[str], dtype: torch.dtype, head_dim: int, configs: Sequence[Any], device: torch.device
) -> None:
    """Check that each backend can run with each selector here at all.

    Raises:
        UsageError: saying which cannot, and why.
    """
    probe = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    for backend in backends:
        for block_size in {config.block_size for config in configs} or {128}:
            try:
                resolve_backend(backend, probe, block_size)
            except ValueError as error:
                raise UsageError(str(error)) from error
