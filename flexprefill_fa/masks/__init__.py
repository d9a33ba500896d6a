"""Selectors by name, and the functions that make BlockMasks of them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill_fa.masks.flashprefill import FlashPrefillConfig
from flexprefill_fa.masks.flexprefill import FlexPrefillConfig
from flexprefill_fa.masks.selector import SelectorConfig, create_block_mask, select_blocks
from flexprefill_fa.masks.streaming_llm import StreamingLLMConfig
from flexprefill_fa.masks.vertical_slash import VerticalSlashConfig

__all__ = [
    "FlashPrefillConfig",
    "FlexPrefillConfig",
    "SelectorConfig",
    "StreamingLLMConfig",
    "VerticalSlashConfig",
    "create_block_mask",
    "create_flashprefill_block_mask",
    "create_flexprefill_block_mask",
    "create_streaming_llm_block_mask",
    "create_vertical_slash_block_mask",
    "get_selector",
    "select_blocks",
]

_SELECTORS: dict[str, type] = {
    kind.name: kind for kind in (FlexPrefillConfig, FlashPrefillConfig, StreamingLLMConfig, VerticalSlashConfig)
}


def get_selector(name: str) -> type:
    """The config class of a selector.

    Raises:
        ValueError: if no selector has that name; the message lists those that exist.
    """
    if name not in _SELECTORS:
        raise ValueError(f"unknown selector {name!r}, expected one of {', '.join(sorted(_SELECTORS))}")
    return _SELECTORS[name]


def _config(kind: type, config: Any, config_fields: dict[str, Any]) -> Any:
    """`config` itself, or a new one from its fields; not both."""
    if config is None:
        known = [field.name for field in fields(kind)]
        unknown = sorted(set(config_fields) - set(known))
        if unknown:
            raise TypeError(f"unexpected argument {', '.join(unknown)}; {kind.__name__} has {', '.join(known)}")
        return kind(**config_fields)
    if config_fields:
        raise TypeError(f"give either config or its fields, got both: config and {', '.join(sorted(config_fields))}")
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")
    return config


def create_flexprefill_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    config: FlexPrefillConfig | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    eager_safe: bool = True,
    **config_fields: Any,
) -> BlockMask:
    """The blocks that FlexPrefill (arXiv 2502.20766) keeps, as a BlockMask for `flex_attention`.

    Call `flex_attention` compiled, with `fullgraph=True`: uncompiled it computes every block, whatever the lists say.

    Args:
        query: `[B, Hq, Lq, D]`, fp32, bf16 or fp16; the last Lq positions of the keys.
        key: `[B, Hkv, Lkv, D]`; query head h reads key head `h // (Hq // Hkv)`.
        config: the settings; or give them as keyword arguments: gamma, tau, min_budget, max_budget (tokens),
            block_size, variant (see `FlexPrefillConfig`).
        lengths: number of real keys of each batch element (right padding), int `[B]`.
        starts: position of its first real key (left padding), int `[B]`.
        scale: score scale, default 1/sqrt(D). Use the same in `flex_attention`.
        eager_safe: let `mask_mod` look the selection up too, so that the mask means the same thing uncompiled, under
            `create_mask` and in `and_masks`. Costs a bool `[B, Hq, nq, nk]` and, at 9 % density, 5 to 8 % of the
            attention's time at 64K tokens and 8 to 18 % at 16K on an H200. False leaves the plain causal mask.

    Returns:
        A BlockMask with per-head lists `[B, Hq, nq]`, without the lists that only a backward pass needs.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
    """
    checked = _config(FlexPrefillConfig, config, config_fields)
    return create_block_mask(query, key, checked, lengths=lengths, starts=starts, scale=scale, eager_safe=eager_safe)


def create_flashprefill_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    config: FlashPrefillConfig | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    eager_safe: bool = True,
    **config_fields: Any,
) -> BlockMask:
    """The blocks that FlashPrefill (arXiv 2603.06199) keeps, as a BlockMask for `flex_attention`.

    Settings: alpha, sink_blocks, window_blocks, last_full_blocks, block_size (see `FlashPrefillConfig`). Everything
    else, and what is raised, as for `create_flexprefill_block_mask`.
    """
    checked = _config(FlashPrefillConfig, config, config_fields)
    return create_block_mask(query, key, checked, lengths=lengths, starts=starts, scale=scale, eager_safe=eager_safe)


def create_streaming_llm_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    config: StreamingLLMConfig | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    eager_safe: bool = True,
    **config_fields: Any,
) -> BlockMask:
    """The blocks that StreamingLLM's pattern (arXiv 2309.17453) touches, as a BlockMask for `flex_attention`.

    Settings: sink, window (tokens), block_size (see `StreamingLLMConfig`). Kept blocks are computed whole. Everything
    else, and what is raised, as for `create_flexprefill_block_mask`; the values of query, key and scale do not matter.
    """
    checked = _config(StreamingLLMConfig, config, config_fields)
    return create_block_mask(query, key, checked, lengths=lengths, starts=starts, scale=scale, eager_safe=eager_safe)


def create_vertical_slash_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    config: VerticalSlashConfig | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    eager_safe: bool = True,
    **config_fields: Any,
) -> BlockMask:
    """The top columns and diagonals of each head, a fixed number of each, as a BlockMask for `flex_attention`.

    Settings: vertical_size, slash_size (tokens), block_size (see `VerticalSlashConfig`). Everything else, and what is
    raised, as for `create_flexprefill_block_mask`.
    """
    checked = _config(VerticalSlashConfig, config, config_fields)
    return create_block_mask(query, key, checked, lengths=lengths, starts=starts, scale=scale, eager_safe=eager_safe)
