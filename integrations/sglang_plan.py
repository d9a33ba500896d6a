"""Who attends how in one step of SGLang's scheduler, and which layers and engines can run sparse.

Everything here is decided from numbers that SGLang keeps on the host; nothing waits for the GPU. Imports no SGLang: a
`ForwardBatch`, a `RadixAttention` and a `ModelRunner` are read by the names of their fields.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .engine_plan import Chunk, Rows, StepSplit, count_declined, part_of_step, split_requests, take
from .engine_settings import Settings

_OF_REQUESTS = ("req_pool_indices", "seq_lens", "extend_seq_lens", "extend_prefix_lens", "orig_seq_lens")
_OF_REQUESTS_ON_HOST = (
    "seq_lens_cpu",
    "req_pool_indices_cpu",
    "extend_prefix_lens_cpu",
    "extend_seq_lens_cpu",
    "extend_logprob_start_lens_cpu",
    "mm_inputs",
)
_OF_ROWS = ("input_ids", "positions", "out_cache_loc", "out_cache_loc_virtual")
# Of the whole step: where its rows are written, which is done by then, and the buffer that its output goes to.
_DROPPED = ("kv_loc_plan", "kv_loc_cols", "_attn_output", "tbo_children")
_COUNTED = ("batch_size", "seq_lens_sum", "extend_num_tokens", "extend_start_loc", "global_num_token_non_padded_cpu")
NEEDED_FIELDS = (
    *(
        "forward_mode",
        *_COUNTED,
        "req_pool_indices",
        "seq_lens",
        "seq_lens_cpu",
        "extend_seq_lens",
        "extend_prefix_lens",
    ),
    *("extend_seq_lens_cpu", "extend_prefix_lens_cpu", "input_ids", "positions", "out_cache_loc"),
)
"""Fields of a `ForwardBatch` without which no step can be split."""

# Fields of a `ForwardBatch` that make a step more than causal attention to the tokens of `req_to_token`.
_SPECIAL = {
    "encoder_lens": "the tokens of an encoder",
    "cross_attention_custom_mask": "a mask of its own",
    "multi_item_delimiter_indices": "several items in a prompt",
    "attn_cp_metadata": "context parallelism",
    "attn_dcp_metadata": "context parallelism",
    "encoder_swa_row_floor": "a replayed window",
    "mha_return_lse": "wanted log-sum-exps",
}
# The same in the parent's metadata of it.
_SPECIAL_METADATA = {"custom_mask": "a mask of its own", "image_token_ranges": "a mask of images"}


def row_starts(batch: Any) -> list[int]:
    """First query row of each request and, last, the number of rows: `[requests + 1]`."""
    return [0, *accumulate(batch.extend_seq_lens_cpu)]


def key_counts(batch: Any) -> list[int]:
    """Keys that the last query of each request sees."""
    pairs = zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)
    return [prefix + queries for prefix, queries in pairs]


def is_prefill(batch: Any) -> bool:
    """Whether a step has prompts to prefill: not decoding, nor drafts to verify or to extend."""
    return batch.forward_mode.name in ("EXTEND", "MIXED") and batch.batch_size > 0


def step_problem(batch: Any, metadata: Any) -> str | None:
    """Why no request of a prefill step can run sparse, however long it is, or None.

    Args:
        batch: SGLang's `ForwardBatch`.
        metadata: what the parent made of it.
    """
    if batch.extend_seq_lens_cpu is None or batch.extend_prefix_lens_cpu is None:
        return "lengths that only the GPU knows"
    for owner, special in ((batch, _SPECIAL), (metadata, _SPECIAL_METADATA)):
        for name, kind in special.items():
            value = getattr(owner, name, None)
            if value is not None and value is not False:
                return kind
    return None


def split_step(batch: Any, settings: Settings) -> tuple[StepSplit | None, int]:
    """Which requests of a step without a `step_problem` run sparse, None where none does; how many were declined."""
    starts, kv_lens = row_starts(batch), key_counts(batch)
    split = split_requests(starts, kv_lens, settings)
    split = split if split.chunks else None
    return split, count_declined(starts, kv_lens, split, settings)


@dataclass
class SparseStep:
    """A step with sparse chunks.

    Attributes:
        chunks: the sparse chunks.
        slots: for each, where the KV pool has its keys, in order, int32 `[kv_len]`, copied: SGLang may write over its
            own table once the step is planned.
        rest: a `ForwardBatch` of the other requests, None where there are none; rows: of their queries.
        num_rows: query rows of the whole step, without padding.
    """

    chunks: tuple[Chunk, ...]
    slots: tuple[Tensor, ...]
    rest: Any
    rows: Rows | None
    num_rows: int


def sparse_step(batch: Any, split: StepSplit, req_to_token: Tensor, plan_rest: Callable[[Any], None]) -> SparseStep:
    """What the layers need in a step with sparse chunks.

    Args:
        batch: SGLang's `ForwardBatch`.
        split: of it.
        req_to_token: `[slots of requests, tokens]`, where the KV pool has each token of a request.
        plan_rest: has the parent make its metadata of a `ForwardBatch`.
    """
    slots = tuple(
        req_to_token[:, : chunk.kv_len].index_select(0, batch.req_pool_indices[chunk.request, None])[0]
        for chunk in split.chunks
    )
    rest, rows = None, None
    if split.rest:
        rest, rows = restrict(batch, split.rest)
        plan_rest(rest)
    return SparseStep(split.chunks, slots, rest, rows, sum(batch.extend_seq_lens_cpu))


def restrict(batch: Any, requests: Sequence[int]) -> tuple[Any, Rows]:
    """The step as if it had only some of its requests, and the rows of their queries.

    Args:
        batch: SGLang's `ForwardBatch`; left as it is.
        requests: indices of the requests to keep, ascending, at least one.

    Returns:
        A `ForwardBatch` of `len(requests)` requests whose queries stand together from row 0, good for attention without
        writing to the KV pool, and where those rows are in the step.
    """
    device = batch.seq_lens.device
    part = part_of_step(row_starts(batch), requests, device)
    restricted = copy.copy(batch)
    for names, where in ((_OF_REQUESTS, part.requests), (_OF_REQUESTS_ON_HOST, part.on_host), (_OF_ROWS, part.rows)):
        for name in names:
            if getattr(batch, name, None) is not None:
                setattr(restricted, name, take(getattr(batch, name), where))
    for name in _DROPPED:
        if hasattr(batch, name):
            setattr(restricted, name, None)
    queries = restricted.extend_seq_lens
    restricted.batch_size = len(requests)
    restricted.extend_start_loc = torch.cumsum(queries, 0, dtype=queries.dtype) - queries
    restricted.extend_num_tokens = restricted.global_num_token_non_padded_cpu = sum(part.lengths)
    restricted.seq_lens_sum = sum(key_counts(restricted))
    return restricted, part.rows


def layer_problem(layer: Any, dtype: torch.dtype) -> str | None:
    """Why a layer is served by the parent alone, or None.

    Args:
        layer: SGLang's `RadixAttention`.
        dtype: of the queries.
    """
    from flexprefill_fa.validation import MAX_HEAD_DIM, MIN_HEAD_DIM

    kind = getattr(layer.attn_type, "value", layer.attn_type)
    if layer.is_cross_attention or kind != "decoder":
        return "attention that is not causal"
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return "a sliding window"
    if layer.logit_cap:
        return "capped scores"
    if layer.use_irope:
        return "attention to chunks"
    if layer.pos_encoding_mode != "NONE" or layer.xai_temperature_len > 0:
        return "positions in its scores"
    if layer.v_head_dim != layer.qk_head_dim:
        return f"head dims of {layer.qk_head_dim} for keys and {layer.v_head_dim} for values"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}"
    if not MIN_HEAD_DIM <= layer.head_dim <= MAX_HEAD_DIM:
        return f"a head dim of {layer.head_dim}, outside {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return None
