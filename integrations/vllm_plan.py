"""Who attends how in one step of vLLM's scheduler: long prefill chunks sparsely, everything else by the parent backend.

Everything here is decided from numbers that vLLM keeps on the host; nothing waits for the GPU. Imports no vLLM: a
step's `CommonAttentionMetadata` is read by the names of its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv

from .engine_plan import Chunk, Rows, StepSplit, count_declined, part_of_step, split_requests, take, to_device
from .engine_settings import LEAST_PREFILL_TOKENS, Settings

# The fields of vLLM's `CommonAttentionMetadata` that a step of fewer requests has as well; versions differ in them.
_COUNTED = ("query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len")
_OF_REQUESTS = ("seq_lens", "block_table_tensor", "rswa_prefix_lens")
_OF_REQUESTS_ON_HOST = (
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "req_idx",
    "replayssm_decode_base_cpu",
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
)
_OF_ROWS = ("slot_mapping", "positions")
_CACHED = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")
KNOWN_FIELDS = (*_COUNTED, *_OF_REQUESTS, *_OF_REQUESTS_ON_HOST, *_OF_ROWS, *_CACHED, "causal")
"""Fields that `restrict` knows; a step where another one is set is not split."""
NEEDED_FIELDS = (*_COUNTED, "seq_lens", "block_table_tensor", "seq_lens_cpu_upper_bound", *_OF_ROWS, "causal")
"""Fields without which no step can be split."""


def step_problem(common: Any) -> str | None:
    """Why no request of a step can run sparse, however long it is, or None.

    Args:
        common: vLLM's `CommonAttentionMetadata`. A field that is not known here belongs to the whole step: the parent's
            metadata cannot be built from a part of it.
    """
    if common.causal is not True:
        return "attention that is not causal"
    if common.seq_lens_cpu_upper_bound is None:
        return "lengths that only the GPU knows"
    for field_ in dataclasses.fields(common):
        value = getattr(common, field_.name)
        usual = value is None or (isinstance(value, bool | int | float | str) and value == field_.default)
        if field_.name not in KNOWN_FIELDS and not usual:
            return f"the field {field_.name}"
    return None


def split_step(common: Any, settings: Settings) -> StepSplit | None:
    """`split_requests` of vLLM's `CommonAttentionMetadata`; None where no request runs sparse."""
    if common.max_query_len < settings.min_prefill_tokens or step_problem(common) is not None:
        return None
    kv_lens = common.seq_lens_cpu_upper_bound  # exact for prefill chunks, says vLLM
    requests = common.num_reqs
    split = split_requests(common.query_start_loc_cpu[: requests + 1].tolist(), kv_lens[:requests].tolist(), settings)
    return split if split.chunks else None


def declined_chunks(common: Any, split: StepSplit | None, settings: Settings) -> int:
    """Chunks of prompts long enough for sparse attention that the parent serves: too few queries, or no split.

    Args:
        common: vLLM's `CommonAttentionMetadata`.
        split: of it, None where no request runs sparse.
        settings: the thresholds. Fewer than 128 queries are no chunk but decoding, drafts or a question.
    """
    kv_lens = common.seq_lens_cpu_upper_bound
    if common.max_query_len < LEAST_PREFILL_TOKENS or kv_lens is None:
        return 0
    requests = common.num_reqs
    starts = common.query_start_loc_cpu[: requests + 1].tolist()
    return count_declined(starts, kv_lens[:requests].tolist(), split, settings)


def restrict(common: Any, requests: Sequence[int]) -> tuple[Any, Rows]:
    """The step as if it had only some of its requests, and the rows of their queries.

    Args:
        common: vLLM's `CommonAttentionMetadata`, a dataclass; left as it is.
        requests: indices of the requests to keep, ascending, at least one.

    Returns:
        A `CommonAttentionMetadata` of `len(requests)` requests whose queries stand together from row 0, and where
        those rows are in the step.
    """
    device = common.query_start_loc.device
    part = part_of_step(common.query_start_loc_cpu[: common.num_reqs + 1].tolist(), requests, device)
    start_loc_cpu = torch.tensor([0, *part.lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    places = [(_OF_REQUESTS, part.requests), (_OF_REQUESTS_ON_HOST, part.on_host), (_OF_ROWS, part.rows)]
    changed = {
        name: take(getattr(common, name), where) for names, where in places for name in names if hasattr(common, name)
    }
    changed |= {name: None for name in _CACHED if hasattr(common, name)}
    changed |= {
        "query_start_loc": to_device(start_loc_cpu, device),
        "query_start_loc_cpu": start_loc_cpu,
        "num_reqs": len(requests),
        "num_actual_tokens": sum(part.lengths),
        "max_query_len": max(part.lengths),
        "max_seq_len": int(changed["seq_lens_cpu_upper_bound"].max()),
    }
    return dataclasses.replace(common, **changed), part.rows


@dataclass
class SparseStep:
    """What the builder hands to the layers in a step with sparse chunks.

    Attributes:
        chunks: the sparse chunks.
        blocks: for each, the cache blocks of its keys in order, int32 `[blocks]`.
        rest: the parent's metadata for the other requests, None where there are none; rows: of their queries.
        build_dense: makes the parent's metadata for the whole step.
        num_actual_tokens: query rows of the whole step.
    """

    chunks: tuple[Chunk, ...]
    blocks: tuple[Tensor, ...]
    rest: Any
    rows: Rows | None
    build_dense: Callable[[], Any] = field(repr=False)
    num_actual_tokens: int

    @cached_property
    def dense(self) -> Any:
        """The parent's metadata for every request: for layers that stay dense, and where sparse attention failed."""
        return self.build_dense()


def sparse_step(
    common: Any, split: StepSplit, block_size: int, build: Callable[[Any], Any], build_dense: Callable[[], Any]
) -> SparseStep:
    """A step's metadata.

    Args:
        common: vLLM's `CommonAttentionMetadata`.
        split: of it.
        block_size: tokens per block of the KV cache, as the block table counts them.
        build: makes the parent's metadata of a `CommonAttentionMetadata`.
        build_dense: makes it for the whole step, by buffers of its own.
    """
    blocks = tuple(common.block_table_tensor[chunk.request, : cdiv(chunk.kv_len, block_size)] for chunk in split.chunks)
    rest, rows = None, None
    if split.rest:
        restricted, rows = restrict(common, split.rest)
        rest = build(restricted)
    return SparseStep(split.chunks, blocks, rest, rows, build_dense, common.num_actual_tokens)


def model_problem(vllm_config: Any) -> str | None:
    """Why a model is refused, or None: vLLM would have chosen its backend by rules that CUSTOM switches off.

    Where no backend is named, vLLM sets FlashAttention 4, Triton or `use_non_causal` for these models before any layer
    asks (`vllm.model_executor.models.config`); beside CUSTOM the parent would be another backend than that.
    """
    text = vllm_config.model_config.hf_text_config
    dims = getattr(text, "head_dim", None), getattr(text, "global_head_dim", None)
    if None not in dims and dims[0] != dims[1]:
        kind = f"head_dim {dims[0]} and global_head_dim {dims[1]}"
    elif vllm_config.diffusion_config is not None:
        kind = "a diffusion language model"
    else:
        return None
    return f"the sparse prefill backend does not serve {kind}: start vLLM without --attention-backend"


# Criteria that change nothing here, or that the builder looks at.
_NEUTRAL_CRITERIA = (
    "block_size",
    "use_per_head_quant_scales",
    "has_sliding_window",
    "use_kv_connector",
    "use_pcp",
    "use_dcp",
)


def backend_problem(
    *,
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None = None,
    use_mla: bool = False,
    has_sink: bool = False,
    use_sparse: bool = False,
    use_mm_prefix: bool = False,
    attn_type: str = "decoder",
    use_non_causal: bool = False,
    use_batch_invariant: bool = False,
    use_rswa: bool = False,
    use_adaptive_verification: bool = False,
    **others: Any,
) -> str | None:
    """Why layers of this kind are served by the parent alone, or None; the arguments are vLLM's selection criteria."""
    from flexprefill_fa.validation import MAX_HEAD_DIM, MIN_HEAD_DIM

    if use_mla or use_sparse:
        return "multi-head latent attention"
    if use_batch_invariant:
        return "batch invariance, which a selection that depends on its chunk cannot keep,"
    if kv_cache_dtype not in (None, "auto", str(dtype).removeprefix("torch.")):
        return f"a KV cache of {kv_cache_dtype}"
    if has_sink:
        return "attention sinks"
    if use_rswa:
        return "reference sliding-window attention"
    if use_adaptive_verification:
        return "adaptive verification, whose query lengths only the GPU knows,"
    if use_mm_prefix or use_non_causal or str(getattr(attn_type, "value", attn_type)) != "decoder":
        return "attention that is not causal"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}"
    if not MIN_HEAD_DIM <= head_size <= MAX_HEAD_DIM:
        return f"a head dim of {head_size}, outside {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    unknown = [name for name, value in others.items() if value and name not in _NEUTRAL_CRITERIA]
    return f"the unknown criterion {unknown[0]}" if unknown else None


# What some of the parents take besides vLLM's common arguments, and the value that changes nothing.
_NEUTRAL = {"sinks": None, "use_alibi_sqrt": False, "chunk_lookback": -1}


def layer_problem(
    *, alibi_slopes: Any, sliding_window: int | None, logits_soft_cap: float | None, extra: dict[str, Any]
) -> str | None:
    """Why a layer is served by the parent alone, or None."""
    if alibi_slopes is not None:
        return "ALiBi"
    if sliding_window is not None:
        return "a sliding window"
    if logits_soft_cap:
        return "capped scores"
    for name, value in extra.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            return f"its argument {name}"
    return None
