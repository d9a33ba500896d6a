"""What transformers calls for each layer: the attention function and the mask function.

The mask function hands on only what the attention function needs (padding, or that sequences are packed), so that no
n x n mask exists for a long prompt. Both know one constant: fewer queries than `MIN_QUERY_TOKENS` are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexprefill_fa.backends import kernel_options, resolve_backend
from flexprefill_fa.block_mask import needs_position
from flexprefill_fa.dense import dense_attention, dense_mask_fits
from flexprefill_fa.grid import Grid, real_ranges, visible_blocks
from flexprefill_fa.masks import FlexPrefillConfig, SelectorConfig
from flexprefill_fa.region import run_select_and_attend
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import check_query_key, check_value

MINIMUM_VERSION = (5, 17)

try:
    import transformers
except ImportError as error:
    raise ImportError("the Hugging Face integration needs transformers: pip install 'flexprefill-fa[hf]'") from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_VERSION:
    raise ImportError(
        f"the Hugging Face integration needs transformers >= {'.'.join(map(str, MINIMUM_VERSION))}, "
        f"got {transformers.__version__}"
    )

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask  # noqa: E402

# A decode step or a verification chunk has fewer queries than this.
MIN_QUERY_TOKENS = 128


@dataclass
class LayerStatistics:
    """What one layer kept in its latest sparse prefill; all `[B, Hq]`.

    Attributes:
        density: kept blocks / causal blocks.
        js_distance: FlexPrefill's Jensen-Shannon distance.
        recall: share of the exact attention probability in kept blocks, None unless asked for.
        kept_blocks: number of kept blocks.
    """

    density: Tensor
    js_distance: Tensor
    recall: Tensor | None
    kept_blocks: Tensor


class PackedPrompt:
    """Stands in for the attention mask when several sequences share one row, separated by their position ids."""


_PACKED = PackedPrompt()


class LayerPlan:
    """What one attention layer does: set on the module, read by the attention function."""

    def __init__(self, config: SelectorConfig, min_prompt_tokens: int, statistics: str | None) -> None:
        self.config = config
        self.settings = config.settings()
        self.min_prompt_tokens = min_prompt_tokens
        self.statistics = statistics
        self.latest: LayerStatistics | None = None


def default_plan() -> LayerPlan:
    """For a model that asks for the implementation by name alone."""
    config = FlexPrefillConfig()
    return LayerPlan(config, config.dense_tokens + 1, None)


_DEFAULT_PLAN = default_plan()
_INTERSECTION = and_masks(causal_mask_function).__code__
_KEEP_ALL = LayerPlan(FlexPrefillConfig(gamma=1.0), 1, None)
PLAN_ATTRIBUTE = "_sparse_prefill_plan"


def unsupported(
    sliding_window: int | None, softcap: float | None, s_aux: Tensor | None, position_bias: Tensor | None, cache: Any
) -> str | None:
    """Why a layer's attention cannot be served, or None."""
    if sliding_window is not None:
        return f"it attends to a sliding window ({sliding_window} tokens)"
    if softcap is not None:
        return f"it caps its scores (softcap {softcap})"
    if s_aux is not None:
        return "it has attention sinks (s_aux)"
    if position_bias is not None:
        return "it adds a position bias to its scores"
    if cache is not None:
        return "it uses a paged cache"
    return None


def _padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(first real key, number of real keys), int32 `[B]` each, of a padding mask `[B, kv_len]`."""
    return mask.to(torch.int32).argmax(-1).to(torch.int32), mask.sum(-1, dtype=torch.int32)


@torch.library.custom_op("flexprefill_fa::sequence_ids", mutates_args=())
def _sequence_ids(position_ids: Tensor, batch: int) -> Tensor:
    """int32 `[B, n]`: which packed sequence each token belongs to; a new one starts where positions do not go up by 1.

    An operator, because FlexAttention wants the tensors that a mask_mod captures in memory.
    """
    ids = position_ids.expand(batch, -1)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids.diff(dim=-1) != 1
    return new.cumsum(-1).to(torch.int32)


@_sequence_ids.register_fake
def _(position_ids: Tensor, batch: int) -> Tensor:
    return position_ids.new_empty((batch, position_ids.shape[-1]), dtype=torch.int32)


def _same_sequence(sequence: Tensor) -> Callable[..., Tensor]:
    def same_sequence(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return sequence[b, q_idx] == sequence[b, kv_idx]

    return same_sequence


def _record(
    plan: LayerPlan,
    lists: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    padding: tuple[Tensor | None, Tensor | None],
    scale: float | None,
) -> None:
    """Keep the statistics of a prefill; stays on the GPU."""
    kv_num_blocks, _, full_kv_num_blocks, _, js_distance = lists
    grid = Grid(query.shape[2], key.shape[2], plan.config.block_size)
    ranges = real_ranges(*padding, query.shape[0], grid.kv_len, query.device)
    causal = visible_blocks(grid, ranges).sum((-2, -1))
    kept = (kv_num_blocks + full_kv_num_blocks).sum(-1)
    recall = None
    if plan.statistics == "recall":
        if torch.compiler.is_compiling():
            raise RuntimeError("statistics='recall' computes exact attention and needs an uncompiled model")
        selection = BlockSelection(*lists, grid.q_len, grid.kv_len, grid.block_size, *padding)
        recall = selection.recall(query, key, scale=scale)
    plan.latest = LayerStatistics(kept / causal.clamp(min=1)[:, None], js_distance, recall, kept)


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
    """The attention function that transformers calls: query `[B, Hq, q, D]`, key and value `[B, Hkv, kv, D]`.

    Returns:
        `[B, q, Hq, D]` and None (there are no attention weights).

    Raises:
        ValueError: for a layer or a call that cannot be served, with what to do.
    """
    layer = getattr(module, "layer_idx", None)
    problem = unsupported(sliding_window, softcap, s_aux, position_bias, cache)
    if problem is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        problem = "it is not causal"
    if problem is None and kwargs.get("output_attentions"):
        problem = "output_attentions=True needs the attention weights, which are never computed"
    if problem is not None:
        raise ValueError(
            f"layer {layer} ({type(module).__name__}) cannot run sparse prefill: {problem}. "
            "Use attn_implementation='sdpa' or 'eager' for this model."
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len < MIN_QUERY_TOKENS:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            f"layer {layer}: sparse prefill takes a padding mask [batch, keys] or none, got an attention mask of shape "
            f"{tuple(attention_mask.shape)}; use attn_implementation='sdpa' for custom masks"
        )
    if dropout:
        raise ValueError(f"layer {layer}: sparse prefill is for inference, got dropout {dropout}; call model.eval()")

    check_query_key(query, key)
    check_value(key, value)
    plan: LayerPlan = getattr(module, PLAN_ATTRIBUTE, None) or _DEFAULT_PLAN
    starts, lengths = (None, None) if not isinstance(attention_mask, Tensor) else _padding(attention_mask)
    mask_mod = None
    if isinstance(attention_mask, PackedPrompt):
        if position_ids is None:
            raise ValueError(f"layer {layer}: packed sequences need the model to pass position_ids to its attention")
        mask_mod = _same_sequence(_sequence_ids(position_ids, query.shape[0]))
    if kv_len < plan.min_prompt_tokens:
        if dense_mask_fits(query, key, starts, lengths, mask_mod):
            out = dense_attention(query, key, value, starts, lengths, scaling, mask_mod)
            return out.transpose(1, 2).contiguous(), None
        plan = _KEEP_ALL  # dense all the same, without an n x n mask
    backend = resolve_backend(
        "auto",
        query,
        plan.config.block_size,
        has_mask_mod=mask_mod is not None,
        position_in_graph=torch.compiler.is_compiling() and needs_position(query, key, starts, lengths),
    )
    out, lists = run_select_and_attend(
        query,
        key,
        value,
        starts,
        lengths,
        plan.config,
        plan.settings,
        scale=scaling,
        mask_mod=mask_mod,
        score_mod=None,
        options=kernel_options(backend, query, key, plan.config.block_size),
    )
    if plan.statistics is not None:
        _record(plan, lists, query, key, (starts, lengths), scaling)
    return out.transpose(1, 2).contiguous(), None


def _other_mask(mask_function: Callable, arguments: dict[str, Any]) -> bool:
    """Whether a mask function that comes without a padding mask is another one than that of packed sequences."""
    config = arguments.get("config")
    local = arguments.get("local_size") or getattr(config, "attention_chunk_size", None)
    # Packing intersects masks; unions (images that see themselves both ways) carry another function's code.
    intersects = torch.compiler.is_compiling() or mask_function.__code__ is _INTERSECTION
    return bool(local) or not intersects


def flexprefill_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Any:
    """The mask function that transformers calls; never an n x n mask for a long prompt.

    Returns:
        None for a causal prompt without padding, the padding mask `[B, kv]` where there is one, a mark for packed
        sequences, and what SDPA wants for decode steps and short chunks.

    Raises:
        ValueError: for masks that sparse prefill does not serve. That each row's real tokens are one run is checked by
            reading the mask back, once per forward pass; a compiled model is not checked.
    """
    if q_length < MIN_QUERY_TOKENS:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # pyright: ignore[reportArgumentType]  # a tensor with static caches
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        )
    # Only a static cache has more keys than were seen, and counts what it has seen on the device.
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            "sparse prefill does not serve static caches yet: use a dynamic cache (cache_implementation=None)"
        )
    if mask_function is not causal_mask_function:
        if kwargs.get("local_size"):
            window = kwargs["local_size"]
            raise ValueError(
                f"this model asks for another mask than sparse prefill serves (a sliding window of {window} tokens): "
                "use attn_implementation='sdpa'"
            )
        packed = attention_mask is None and q_length == kv_length and not use_vmap
        if not packed or _other_mask(mask_function, kwargs):
            raise ValueError(
                "sparse prefill serves causal masks, padding and packed sequences; this model asks for another mask: "
                "use attn_implementation='sdpa'"
            )
        return _PACKED
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if torch.compiler.is_compiling():
        return mask
    if mask.all():
        return None
    # Real tokens must be one run: from the first to the last there is no gap.
    if not torch.equal(mask.int().diff(dim=-1).abs().sum(-1) + mask[:, 0].int() + mask[:, -1].int(), _two(mask)):
        raise ValueError(
            "sparse prefill needs each row's real tokens in attention_mask to be one run, "
            "got a row with gaps or without any"
        )
    return mask


def _two(mask: Tensor) -> Tensor:
    return torch.full((mask.shape[0],), 2, dtype=torch.int64, device=mask.device)
