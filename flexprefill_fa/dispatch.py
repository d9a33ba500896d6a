"""The one place that decides how a prompt's attention is computed: dense or sparse, which kernel, which options.

Two questions, asked apart: `dense` says whether attention over every block may take the selector's place, and
`backend` names the kernel. The core call, transformers (both by `calls.py`) and `block_sparse_attention` come here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flexprefill_fa.backends import kernel_options, resolve_backend
from flexprefill_fa.block_mask import needs_position
from flexprefill_fa.cost_model import prefers_dense
from flexprefill_fa.dense import dense_attention, dense_mask_fits
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.masks.streaming_llm import StreamingLLMConfig
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.region import Call, run_select_and_attend
from flexprefill_fa.selection import BlockSelection, every_block
from flexprefill_fa.validation import MAX_INTEGER

logger = logging.getLogger(__name__)

DENSE = ("auto", "never")
# Every block of every head, and no score: a window longer than any prompt.
EVERYTHING = {size: StreamingLLMConfig(sink=0, window=MAX_INTEGER // 2, block_size=size) for size in (64, 128)}


@dataclass(frozen=True)
class Request:
    """What was asked of one attention call, besides its tensors and its selector.

    Attributes:
        scale: score scale, None for 1/sqrt(D).
        starts, lengths: int32 `[B]`, first real key and number of real keys; None: all are real.
        mask_mod, score_mod: the caller's, as FlexAttention's; the selector sees neither.
        mean_correction: whether dropped blocks count, and by which means.
        sinks: `[Hq]`, a score per head that gives no value; for CUDA.
        dense: "auto" or "never".
        backend: "auto", or the kernel: "TRITON", "FLASH" or "CPU".
        min_tokens: keys from which a prompt runs sparse; None: where the cost model expects it to be faster.
        settings: the selector's, where they are at hand: a traced model then takes them as an input.
    """

    scale: float | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    mask_mod: Callable[..., Tensor] | None = None
    score_mod: Callable[..., Tensor] | None = None
    mean_correction: MeanCorrection = False
    sinks: Tensor | None = None
    dense: str = "auto"
    backend: str = "auto"
    min_tokens: int | None = None
    settings: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How it is computed.

    Attributes:
        selector: whose blocks are computed, `EVERYTHING` for dense attention by FlexAttention; None for dense attention
            by the fastest kernel there is.
        sparse: whether the selector is the one that was asked for.
        backend: FlexAttention's kernel.
        options: FlexAttention's kernel_options.
    """

    selector: Selector | None
    sparse: bool
    backend: str
    options: dict[str, Any] = field(default_factory=dict)


def kernel_for(query: Tensor, key: Tensor, block_size: int, request: Request) -> tuple[str, dict[str, Any]]:
    """FlexAttention's kernel, by name, and its kernel_options.

    Raises:
        ValueError: for an unknown backend, or one that cannot run this call.
    """
    backend = _backend_for(query, key, block_size, request)
    return backend, kernel_options(backend, query, key, block_size)


def _backend_for(query: Tensor, key: Tensor, block_size: int, request: Request) -> str:
    return resolve_backend(
        request.backend,
        query,
        block_size,
        has_score_mod=request.score_mod is not None,
        has_mask_mod=request.mask_mod is not None,
        position_in_graph=is_dynamo_compiling() and needs_position(query, key, request.starts, request.lengths),
    )


def decide(query: Tensor, key: Tensor, selector: Selector | None, request: Request, block_size: int = 128) -> Plan:
    """Dense or sparse, the kernel and its options.

    Args:
        query: `[B, Hq, Lq, D]`. key: `[B, Hkv, Lkv, D]`.
        selector: the one that was asked for; None: dense attention was.
        request: what else was asked for.
        block_size: tokens per block where there is no selector.

    Raises:
        ValueError: for an unknown `dense` or `backend`, or a kernel that cannot run this call.
    """
    if request.dense not in DENSE:
        raise ValueError(f"dense must be one of {DENSE}, got {request.dense!r}")
    size = block_size if selector is None else selector.block_size
    backend = _backend_for(query, key, size, request)
    sparse = selector is not None and not _is_dense(query, key, selector, request, backend)
    if not sparse:
        plain = request.score_mod is None and request.sinks is None and request.backend == "auto"
        if plain and dense_mask_fits(query, key, request.starts, request.lengths, request.mask_mod):
            return Plan(None, False, backend)
    options = kernel_options(backend, query, key, size)
    return Plan(selector if sparse else EVERYTHING[size], sparse, backend, options)


def _is_dense(query: Tensor, key: Tensor, selector: Selector, request: Request, backend: str) -> bool:
    if request.dense == "never":
        return False
    if request.min_tokens is not None:
        return key.shape[2] < request.min_tokens
    if request.mask_mod is not None or request.score_mod is not None:
        return False
    if query.shape[2] == 1:
        return True
    if key.shape[2] <= selector.dense_tokens:
        return dense_mask_fits(query, key, request.starts, request.lengths)
    positioned = needs_position(query, key, request.starts, request.lengths)  # dense attention then needs a mask
    if positioned or request.backend != "auto" or is_dynamo_compiling():
        return False
    # The cost model compares with the fastest dense kernel, which one that was named may not be.
    return prefers_dense(query, key, selector, backend)


@dataclass(frozen=True)
class Prepared:
    """All that is decided about a call before it runs; the same for calls that are alike, see `calls.py`.

    Attributes:
        plan: how it is computed. call: what goes with the tensors into the attention.
        settings: those of the plan's selector, where there is one.
    """

    plan: Plan
    call: Call
    settings: Tensor | None


def prepare(query: Tensor, key: Tensor, selector: Selector | None, request: Request, block_size: int = 128) -> Prepared:
    """A call as `decide` plans it; arguments and errors as there."""
    plan = decide(query, key, selector, request, block_size)
    call = Call(
        block_size if selector is None else selector.block_size,
        request.scale,
        request.mask_mod,
        request.score_mod,
        plan.options,
        request.mean_correction if plan.sparse else False,
        request.sinks,
    )
    if plan.selector is None:
        return Prepared(plan, call, None)
    at_hand = request.settings if plan.sparse else None
    return Prepared(plan, call, plan.selector.settings() if at_hand is None else at_hand)


Found = tuple[Tensor, Callable[[], BlockSelection], bool]
"""`[B, Hq, Lq, D]`; what makes the selection that was computed; and whether it is the selector's."""


def run(
    prepared: Prepared, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, lengths: Tensor | None
) -> Found:
    """Attention as it was prepared for tensors like these, on checked arguments."""
    plan, call = prepared.plan, prepared.call
    size, chosen = call.block_size, plan.selector
    if chosen is None:
        _say("dense attention", query, key)
        out = dense_attention(query, key, value, starts, lengths, call.scale, call.mask_mod)
        return out, lambda: every_block(query, key, size, starts, lengths), False
    _say(f"{'sparse' if plan.sparse else 'dense'} attention by {plan.backend}", query, key)
    assert prepared.settings is not None  # `prepare` gives a selector its settings
    out, found = run_select_and_attend(query, key, value, starts, lengths, chosen.operator(), prepared.settings, call)
    names, partial = chosen.diagnostics, call.mask_mod is not None
    return out, lambda: BlockSelection.of(found, names, query, key, size, starts, lengths, partial), plan.sparse


def _say(what: str, query: Tensor, key: Tensor) -> None:
    if not is_dynamo_compiling():  # a logger would break the caller's graph
        logger.debug("%s: %d queries, %d keys", what, query.shape[2], key.shape[2])
