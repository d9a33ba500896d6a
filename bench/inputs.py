"""The inputs of a benchmark by the name of their workload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.needle.capture import capture
from bench.workloads import Inputs, sharpness_of, structured_inputs
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle import MODEL_DIR

if TYPE_CHECKING:
    from bench.attention import Plan

WORKLOADS = ("sharpened", "fixed", "needle")
"""Structured heads that get sharper with length, structured heads that do not, and a layer of the needle model."""


def make_inputs(plan: Plan, length: int) -> tuple[Inputs, dict[str, Any]]:
    """Queries, keys and values of `length` tokens, and what a row must say about them besides their shapes.

    Raises:
        UsageError: for a layer that the needle model does not have, or a length that its prompt cannot have.
        ValueError: for head counts or a head_dim that do not fit.
    """
    if plan.workload == "needle":
        try:
            tensors = capture(length, plan.layer, dtype=plan.dtype, device=plan.device, seed=plan.seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        query, key, value = (tensor.repeat(plan.batch, 1, 1, 1) for tensor in tensors)
        return Inputs(query, key, value), {"layer": plan.layer, "model_sha256": model_sha256(MODEL_DIR)}
    sharpness = sharpness_of(plan.workload, length)
    inputs = structured_inputs(
        length,
        plan.heads,
        plan.kv_heads,
        plan.head_dim,
        sharpness=sharpness,
        batch=plan.batch,
        dtype=plan.dtype,
        device=plan.device,
        seed=plan.seed,
    )
    return inputs, {"sharpness": round(sharpness, 4)}
