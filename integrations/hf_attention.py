"""The attention function that transformers calls for each layer.

Prompts of at least `MIN_QUERY_TOKENS` queries go to FlexAttention: sparse where the layer attends to everything, the
window's blocks where it has one. What the layer adds is served with it: capped scores as a score_mod, attention sinks
by the log-sum-exp. Decode steps, short chunks and layers that see only a prompt's last few queries run dense.
"""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import functools
import logging
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flexprefill_fa.autocast import as_sdpa_casts
from flexprefill_fa.block_mask import both, item
from flexprefill_fa.calls import attend
from flexprefill_fa.dense import attention_with_extras, fastest_dense
from flexprefill_fa.dispatch import Request
from flexprefill_fa.masks import StreamingLLMConfig
from flexprefill_fa.validation import MAX_HEAD_DIM, MIN_HEAD_DIM

from .hf_mask import MIN_QUERY_TOKENS, PromptMask
from .hf_plan import PLAN_ATTRIBUTE, LayerPlan, LayerStatistics, SparseCall, default_plan
from .hf_ranks import own_part

logger = logging.getLogger(__name__)

_DEFAULT_PLAN = default_plan()


def flexprefill_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query `[B, Hq, q, D]`, key `[B, Hkv, kv, D]`, value `[B, Hkv, kv, Dv]`.

    Returns:
        `[B, q, Hq, Dv]` and None (there are no attention weights).

    Raises:
        ValueError: for a layer or a call that cannot be served, with what to do.
    """
    query, key, value = _of_one_dtype(query, key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Of an encoder, such as a vision tower, in a model that has the implementation by name: nothing to select from.
    encoder = not causal and softcap is None and s_aux is None and _is_of_sdpa(attention_mask)
    _check_call(module, position_bias, cache, causal or encoder, kwargs)
    if encoder:
        _say_dense(module, "it is not causal")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False
        )
    if s_aux is not None:
        s_aux = own_part(s_aux)
    short = query.shape[2] < MIN_QUERY_TOKENS  # though the prompt may not be: some layers see its last queries alone
    prompt = None if short and attention_mask is None else PromptMask.of(attention_mask)
    if prompt is None:
        if not short:
            _say_dense(module, "it was given an attention mask that sparse prefill does not serve")
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
            )
        mask = _square(attention_mask, query.shape[2], key.shape[2], query.device)
        out = attention_with_extras(query, key, value, mask, scaling, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        raise ValueError(
            f"{_layer_name(module)}: sparse prefill is for inference, got dropout {dropout}; call model.eval()"
        )
    if prompt.keys is not None:
        key, value = key[:, :, : prompt.keys], value[:, :, : prompt.keys]
    if prompt.packed and (position_ids is None or position_ids.shape[-1] != key.shape[2]):
        raise ValueError(
            f"{_layer_name(module)}: packed sequences need the model to pass position_ids of all keys to its attention"
        )
    plan: LayerPlan = getattr(module, PLAN_ATTRIBUTE, None) or _DEFAULT_PLAN
    plain = prompt.is_plain and softcap is None and s_aux is None and sliding_window is None
    dense = plan.config is None or key.shape[2] < plan.min_prompt_tokens
    trains = torch.is_grad_enabled() and query.requires_grad  # which is refused
    if plain and dense and query.shape[2] == key.shape[2] and not trains and fastest_dense(query) == "sdpa":
        # What the model would do by itself.
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    if prompt.windowed and sliding_window is None:  # some models leave their window to the mask
        sliding_window = plan.window
        if sliding_window is None:
            raise ValueError(
                f"{_layer_name(module)} does not say how long its sliding window is: call enable_sparse_prefill(model)"
            )
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    out = _prefill(module, plan, prompt, query, key, value, scale, sliding_window, softcap, s_aux, position_ids)
    return out.transpose(1, 2).contiguous(), None


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the model's own attention would cast them: autocast's dtype, else that of the projections, which value has.

    Rotary embeddings and norms of some models leave queries and keys in fp32.
    """
    query, key, value = as_sdpa_casts(query, key, value)
    return query.to(value.dtype), key.to(value.dtype), value


def _is_of_sdpa(mask: Any) -> bool:
    """Whether a mask is one that SDPA takes, none among them."""
    return mask is None or (isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point()))


def _check_call(
    module: nn.Module, position_bias: Tensor | None, cache: Any, causal: bool, kwargs: dict[str, Any]
) -> None:
    problem = None
    if position_bias is not None:
        problem = "it adds a position bias to its scores"
    elif cache is not None:
        problem = "it uses a paged cache"
    elif not causal:
        problem = "it is not causal"
    elif kwargs.get("output_attentions"):
        problem = "output_attentions=True needs the attention weights, which are never computed"
    if problem is not None:
        raise ValueError(
            f"{_layer_name(module)} cannot run sparse prefill: {problem}. "
            "Use attn_implementation='sdpa' or 'eager' for this model."
        )


def _layer_name(module: nn.Module) -> str:
    return f"layer {getattr(module, 'layer_idx', None)} ({type(module).__name__})"


_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _say_dense(module: nn.Module, reason: str) -> None:
    """Once for each layer and reason; a traced model says nothing."""
    if torch.compiler.is_dynamo_compiling() or reason in (said := _said.setdefault(module, set())):
        return
    said.add(reason)
    logger.warning("%s runs dense: %s", _layer_name(module), reason)


def _square(mask: Tensor | None, q_len: int, kv_len: int, device: torch.device) -> Tensor | None:
    """The mask that SDPA would take: none stands for causal, counted from the first key."""
    if mask is not None or q_len == 1:
        return mask
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril()


def _prefill(
    module: nn.Module,
    plan: LayerPlan,
    prompt: PromptMask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """`[B, Hq, q, Dv]` of a prompt whose queries are the last of the keys."""
    starts, lengths = (None, None) if prompt.padding is None else _run_of(prompt.padding)
    kv_len = key.shape[2]
    windowed = window is not None
    # A traced model has no lengths to compare a window with.
    if window is not None and not torch.compiler.is_dynamo_compiling() and kv_len <= window:
        window = None
    masks = []
    if prompt.packed:
        assert position_ids is not None  # checked by the caller
        masks.append(_same_sequence(*_sequence_ids(position_ids, query)))
    if window is not None:
        masks.append(_from(_window_starts(query, key, window)))
    mask_mod = functools.reduce(both, masks) if masks else None

    value_dim = value.shape[-1]
    if max(query.shape[-1], value_dim) > MAX_HEAD_DIM:
        problem = f"its head dim of {max(query.shape[-1], value_dim)} is above {MAX_HEAD_DIM}"
    elif sinks is not None and query.device.type == "cpu":
        problem = "its attention sinks need a log-sum-exp, which FlexAttention does not give on the CPU"
    else:
        problem = None
    short = query.shape[2] < MIN_QUERY_TOKENS
    plain = softcap is None and sinks is None
    if problem is not None:
        _say_dense(module, problem)
    if problem is not None or (short and not plain):
        return attention_with_extras(
            query, key, value, None, scaling, softcap=softcap, sinks=sinks, starts=starts, lengths=lengths,
            mask_mod=mask_mod,
        )  # fmt: skip

    size = 128 if plan.config is None else plan.config.block_size
    asked = plan.config is not None and not windowed and not short
    chosen = plan.config if asked else None
    if window is not None and not short:
        chosen = StreamingLLMConfig(sink=0, window=window, block_size=size)
    correction = plan.mean_correction if asked else False
    if correction and mask_mod is not None:
        if plan.insists:
            raise ValueError(f"{_layer_name(module)}: mean_correction cannot be combined with packed sequences")
        correction = False
    request = Request(
        scaling,
        starts,
        lengths,
        mask_mod,
        None if softcap is None else _capped(_score_caps(query, softcap)),
        correction,
        sinks,
        min_tokens=plan.min_prompt_tokens if asked else 1,
        settings=plan.settings if asked and torch.compiler.is_dynamo_compiling() else None,
    )
    query, key, value = _padded_head_dims(query, key, value)
    watched = asked and (plan.statistics is not None or plan.observer is not None)
    out, selection, sparse = attend(
        query, key, value, chosen, request, block_size=size, graph=plan.graph, selected=watched
    )
    if sparse and watched:
        layer = getattr(module, "layer_idx", -1)
        _record(plan, SparseCall(layer, selection(), query, key, scaling, softcap))
    return out[..., :value_dim]


def _run_of(padding: Tensor) -> tuple[Tensor, Tensor]:
    """(first real key, number of real keys), int32 `[B]` each, of a padding mask `[B, kv]`."""
    return padding.to(torch.int32).argmax(-1).to(torch.int32), padding.sum(-1, dtype=torch.int32)


def _padded_head_dims(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With one head dim that the kernels take: zeros behind neither change a score nor an output."""
    wanted = max(query.shape[-1], value.shape[-1], MIN_HEAD_DIM)
    query, key, value = (
        x if x.shape[-1] == wanted else F.pad(x, (0, wanted - x.shape[-1])) for x in (query, key, value)
    )
    return query, key, value


@torch.library.custom_op("flexprefill_fa::sequence_ids", mutates_args=())
def _sequence_ids(position_ids: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which packed sequence each token belongs to, int32 `[B * n]`, and where in it the queries and the keys of each
    batch element begin, int32 `[B + 1]` each.

    A new sequence starts where positions do not go up by 1. An operator, because FlexAttention wants the tensors that
    a mask_mod captures in memory.
    """
    batch, _, q_len, _ = query.shape
    ids = position_ids.expand(batch, -1)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids.diff(dim=-1) != 1
    keys = torch.arange(batch + 1, dtype=torch.int32, device=ids.device) * ids.shape[1]
    return new.cumsum(-1).to(torch.int32).flatten(), keys + (ids.shape[1] - q_len), keys


@_sequence_ids.register_fake
def _(position_ids: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    vector = functools.partial(position_ids.new_empty, dtype=torch.int32)
    rows = query.shape[0] + 1
    return vector((query.shape[0] * position_ids.shape[-1],)), vector((rows,)), vector((rows,))


def _same_sequence(sequence: Tensor, queries: Tensor, keys: Tensor) -> Callable[..., Tensor]:
    def same_sequence(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return item(sequence, item(queries, b) + q_idx) == item(sequence, item(keys, b) + kv_idx)

    return same_sequence


# Numbers that a mask_mod or score_mod needs come as tensors, for a traced number would not compile in either; of one
# item, because the CPU's template garbles the names of sizes, see `block_mask.item`.
@torch.library.custom_op("flexprefill_fa::window_starts", mutates_args=())
def _window_starts(query: Tensor, key: Tensor, window: int) -> Tensor:
    """int32 `[1]`: the first position that query 0 sees, before the prompt where its window reaches further back."""
    first = key.shape[2] - query.shape[2] - window + 1
    return torch.full((1,), first, dtype=torch.int32, device=query.device)


@_window_starts.register_fake
def _(query: Tensor, key: Tensor, window: int) -> Tensor:
    return query.new_empty((1,), dtype=torch.int32)


@torch.library.custom_op("flexprefill_fa::score_caps", mutates_args=())
def _score_caps(query: Tensor, softcap: float) -> Tensor:
    """fp32 `[1]`."""
    return torch.full((1,), softcap, dtype=torch.float32, device=query.device)


@_score_caps.register_fake
def _(query: Tensor, softcap: float) -> Tensor:
    return query.new_empty((1,), dtype=torch.float32)


def _from(window_start: Tensor) -> Callable[..., Tensor]:
    def within_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= q_idx + window_start[0]

    return within_window


def _capped(cap: Tensor) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap[0] * torch.tanh(score / cap[0])

    return capped


def _record(plan: LayerPlan, call: SparseCall) -> None:
    """Keep the statistics of a prefill, which stay on the GPU, and show it to the plan's observer."""
    selection = call.selection
    if torch.compiler.is_dynamo_compiling() and (plan.statistics == "recall" or plan.observer is not None):
        what = "an observer of sparse prefill" if plan.observer else "statistics='recall' computes exact attention and"
        raise RuntimeError(f"{what} needs an uncompiled model")
    if plan.statistics is not None:
        recall = None
        if plan.statistics == "recall":
            recall = selection.recall(call.query, call.key, scale=call.scale, softcap=call.softcap)
        plan.latest = LayerStatistics(selection.density(), selection.js_distance, recall, selection.kept_blocks())
    if plan.observer is not None:
        plan.observer(call)
