"""The options that commands of `python -m bench` share, each described once, and what their values mean.

What cannot be read, or cannot be had here, is a `UsageError`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import RESULTS
from flexprefill_fa.backends import flash_problem
from flexprefill_fa.choice import make_config, selector_spec
from flexprefill_fa.tools.fidelity.texts import CORPORA
from flexprefill_fa.tools.loading import UsageError, require_kernels, resolve_device, resolve_dtype, token_count

WORKLOADS = ("sharpened", "fixed", "needle", "model")
"""Structured heads that get sharper with length, and that do not; a layer of the needle model, and of any model."""

_LENGTHS = "4096,8192,16384,32768,65536,131072,262144"


def _option(kind: Any, default: Any, text: str, *names: str, **limits: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, help=text, **limits)], default


OPTIONS = {
    "lengths": _option(str, _LENGTHS, "Prompt lengths in tokens, comma-separated."),
    "selectors": _option(str, "flexprefill", "Comma-separated; name or name:field=value+field=value."),
    "density": _option(str | None, None, "Random blocks of these densities instead of selectors, comma-separated."),
    "backends": _option(str | None, None, "Default: auto and what the device has of FLASH, TRITON and CPU."),
    "heads": _option(int | None, None, "Query heads, 32 by default.", min=1),
    "kv_heads": _option(int | None, None, "Key and value heads, 8 by default.", min=1),
    "head_dim": _option(int | None, None, "128 by default.", min=16),
    "dtype": _option(str, "bfloat16", "bfloat16, float16 or float32."),
    "workload": _option(str, WORKLOADS[0], f"One of {', '.join(WORKLOADS)}."),
    "model": _option(Path | None, None, "For the workload model: a local folder in Hugging Face format."),
    "text": _option(str, "source", f"What that model reads: {' or '.join(CORPORA)}, of this Python."),
    "layer": _option(int, 2, "Of the needle model or that model, for those workloads.", min=0),
    "dense": _option(bool, True, "Time the dense kernels too."),
    "device": _option(str, "auto", "auto (the GPU if there is one), cpu, cuda or cuda:N (not under torchrun)."),
    "seed": _option(int, 0, "Of inputs, weights, prompts and random blocks.", min=0),
    "repeats": _option(int, 20, "Measurements of each time.", min=1),
    "seconds": _option(float, 5.0, "Fewer repeats where they would take longer.", min=0),
    "out": _option(Path, None, "JSON lines; rows are added."),
    "as_json": _option(bool, False, "Print each row on stdout too, the table on stderr.", "--json"),
}
"""By name: what it is, and its default."""


def takes(names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named options of `OPTIONS` behind its own, some with other defaults.

    A command with rows names its file of results by `out`.
    """

    def given(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**options: Any) -> None:
            command(**options)

        own = inspect.signature(command, eval_str=True)
        found = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for name in names.split():
            annotation, default = OPTIONS[name]
            default = RESULTS / f"{defaults[name]}.jsonl" if name == "out" else defaults.get(name, default)
            kind = inspect.Parameter.KEYWORD_ONLY
            found.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
        run.__signature__ = own.replace(parameters=found)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return given


def parse_list(option: str, text: str, among: Sequence[str] = ()) -> list[str]:
    """The items of a comma-separated list, none empty, each once; `among` these, if any are given."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UsageError(f"{option} must be a comma-separated list, got {text!r}")
    twice = sorted({item for item in items if items.count(item) > 1})
    if twice:
        raise UsageError(f"{option} must name each item once, got {', '.join(twice)} more than once")
    if others := [item for item in items if among and item not in among]:
        raise UsageError(f"{option} must be of {', '.join(among)}, got {others[0]!r}")
    return items


def parse_lengths(text: str) -> list[int]:
    """Prompt lengths in tokens, whole numbers from 1, ascending."""
    return sorted(token_count(item) for item in parse_list("lengths", text))


def parse_share(option: str, text: str) -> float:
    """A number in (0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise UsageError(f"{option} must be in (0, 1], got {text}")
    return number


def parse_selector(spec: str) -> Any:
    """The config of `name` or `name:field=value+field=value`, by the selector's own fields."""
    name, options = selector_spec(spec)
    return make_config(name, **options)


def parse_selectors(option: str, text: str) -> list[Any]:
    """The configs of a list, see `parse_selector`; none for no text."""
    return [parse_selector(spec) for spec in parse_list(option, text)] if text else []


def parse_place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where something runs, and in which precision."""
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
