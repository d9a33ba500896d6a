"""From the options of a command line to a checked plan: shapes, device, backends, memory."""

from __future__ import annotations

from typing import Any

import torch
import typer

from bench.attention import Plan
from bench.inputs import WORKLOADS
from bench.memory import free_bytes, needed_bytes, shortage
from bench.needle.capture import model_config
from bench.spec import check_backends, parse_list
from flexprefill_fa.backends import flash_problem
from flexprefill_fa.tools.loading import UsageError, require_kernels, resolve_device, resolve_dtype

_HEADS = (32, 8, 128)  # query heads, kv heads, head_dim


def head_shape(
    workload: str, layer: int, heads: int | None, kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """Query heads, kv heads and head_dim of a workload; None means its default.

    Raises:
        UsageError: for an unknown workload or layer, or numbers that do not fit.
    """
    if workload not in WORKLOADS:
        raise UsageError(f"workload must be one of {', '.join(WORKLOADS)}, got {workload!r}")
    if workload == "needle":
        if (heads, kv_heads, head_dim) != (None, None, None):
            raise UsageError("the needle model has its own heads, kv-heads and head-dim: leave those options out")
        config = model_config()
        if layer >= config["num_hidden_layers"]:
            raise UsageError(f"layer must be in [0, {config['num_hidden_layers']}), got {layer}")
        return config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    found = (heads or _HEADS[0], kv_heads or _HEADS[1], head_dim or _HEADS[2])
    if found[0] % found[1]:
        raise UsageError(f"heads must be a multiple of kv-heads, got {found[0]} and {found[1]}")
    if found[2] % 16:
        raise UsageError(f"head-dim must be a multiple of 16, got {found[2]}")
    return found


def make_plan(
    *,
    backends: str | None,
    shape: tuple[int, int, int],
    dtype: str,
    workload: str,
    device: str,
    configs: list[Any],
    densities: list[float],
    **rest: Any,
) -> Plan:
    """The plan of a command line, checked before any work; `rest` are the other fields of `Plan`.

    Raises:
        UsageError: for a device, dtype or backend that cannot be had.
    """
    where, precision = resolve_device(device), resolve_dtype(dtype)
    if precision is None:
        raise UsageError("dtype must be bfloat16, float16 or float32, got 'auto'")
    heads, kv_heads, head_dim = shape
    require_kernels(where)
    listed = parse_list("backends", backends) if backends else backends_of(where, precision, head_dim)
    check_backends(listed, precision, head_dim, [config.block_size for config in configs] or [128], where)
    return Plan(
        configs=configs,
        densities=densities,
        backends=listed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=precision,
        workload=workload,
        device=where,
        **rest,
    )


def backends_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """What there is to measure: FLASH only where it runs."""
    if device.type == "cpu":
        return ["auto", "CPU"]
    problem = flash_problem(torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device), 128)
    if problem is None:
        return ["auto", "FLASH", "TRITON"]
    typer.echo(f"without FLASH: {problem}", err=True)
    return ["auto", "TRITON"]


def check_memory(plan: Plan, lengths: list[int]) -> None:
    """Check that memory holds what measuring each length takes, before anything runs.

    Raises:
        UsageError: naming the first length for which memory is short, with the bytes needed and free.
    """
    for length in lengths:
        needed = needed_bytes(length, plan.batch, plan.heads, plan.kv_heads, plan.head_dim, plan.dtype, plan.device)
        problem = shortage(needed, free_bytes(plan.device))
        if problem:
            raise UsageError(f"{length} tokens: {problem}")
