"""The names under which FlexPrefill was published, on this package's attention.

The names, arguments and layouts are those of the code released with Lai et al., ICLR 2025 (arXiv 2502.20766); what
is selected is `FlexPrefillConfig(variant="published")`. New code is better off with `sparse_prefill_attention` and
`enable_sparse_prefill`, which also take padding, choose dense attention where it is faster and report statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.attention import sparse_prefill_attention
from flexprefill_fa.masks import FlexPrefillConfig, Selector, StreamingLLMConfig, VerticalSlashConfig
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import check_scale

__all__ = ["flex_prefill_attention", "patch_model"]


def flex_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float,
    tau: float = 0,
    min_budget: int | None = None,
    max_budget: int | None = None,
    gqa_interleave: bool = False,
    softmax_scale: float | None = None,
    block_size: int = 128,
    return_computational_ratio: bool = False,
) -> Any:
    """Causal attention over the blocks that FlexPrefill keeps, on tensors whose heads come after the tokens.

    Prompts longer than max(2 * block_size, min_budget in whole blocks) always run sparse, whatever would be faster.

    Args:
        q: `[B, L, Hq, D]`, fp32, bf16 or fp16; the released code takes B = 1 only. Fewer queries than keys are the
            last positions of the keys.
        k, v: `[B, Lkv, Hkv, D]`, Hq a multiple of Hkv.
        gamma: share of the attention probability to cover, in (0, 1].
        tau: Jensen-Shannon distance below which a head is query-aware, in [0, 1]; 0 makes every head vertical-slash.
        min_budget: tokens that every query row keeps at least; None means one block.
        max_budget: tokens that a row keeps at most, None for no limit; at least max(min_budget, 3 * block_size).
        gqa_interleave: which kv head query head h reads: h % Hkv if True, else h // (Hq // Hkv).
        softmax_scale: score scale for selection and attention, default 1/sqrt(D).
        block_size: tokens per block, 64 or 128.
        return_computational_ratio: also return kept blocks / (query blocks * key blocks), the mean over batch and
            heads. Dense causal attention comes to (nb + 1) / (2 nb), about a half, and not to 1 as with
            `BlockSelection.density`. Reading it waits for the GPU.

    Returns:
        `[B, L, Hq, D]`, contiguous, heads in the order of q; or (that, float).

    Raises:
        ValueError, TypeError: for arguments that do not fit, or inputs that require grad.
    """
    _check_shapes(q, k, v)
    check_scale(softmax_scale, "softmax_scale")
    for name, flag in (
        ("gqa_interleave", gqa_interleave),
        ("return_computational_ratio", return_computational_ratio),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    config = _flexprefill(gamma, tau, min_budget, max_budget, block_size)
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    kv_heads = key.shape[1]
    heads: Tensor | None = None
    if gqa_interleave:
        # Query heads come as g * Hkv + h for kv head h; the attention wants h * groups + g. By an index tensor: a
        # transposed view of the heads does not compile on the CPU.
        heads = torch.arange(query.shape[1], device=query.device)
        query = query[:, heads.view(-1, kv_heads).T.flatten()]
    found = sparse_prefill_attention(
        query,
        key,
        value,
        config,
        scale=softmax_scale,
        # The published function is sparse wherever it selects: the cost model stays out.
        dense="auto" if query.shape[2] == 1 or key.shape[2] <= config.dense_tokens else "never",
        return_selection=return_computational_ratio,
    )
    out: Tensor = found[0] if return_computational_ratio else found
    if heads is not None:
        out = out[:, heads.view(kv_heads, -1).T.flatten()]
    out = out.transpose(1, 2).contiguous()
    return (out, _computational_ratio(found[1])) if return_computational_ratio else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Before they are transposed, so that an error shows what the caller passed."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor [B, L, H, D], got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape [B, L, H, D], got {list(tensor.shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape [B, L, H, D], got {list(k.shape)} and {list(v.shape)}")
    problem = None
    if q.shape[0] != k.shape[0]:
        problem = "one batch size"
    elif q.shape[3] != k.shape[3]:
        problem = "one head dim"
    elif q.shape[2] % k.shape[2]:
        problem = "query heads that are a multiple of the key heads"
    elif q.shape[1] > k.shape[1]:
        problem = "no more queries than keys"
    if problem is not None:
        raise ValueError(f"q and k must have {problem}, got [B, L, H, D] = {list(q.shape)} and {list(k.shape)}")


_PUBLISHED = FlexPrefillConfig()


def _flexprefill(
    gamma: float = _PUBLISHED.gamma,
    tau: float = _PUBLISHED.tau,
    min_budget: int | None = _PUBLISHED.min_budget,
    max_budget: int | None = _PUBLISHED.max_budget,
    block_size: int = _PUBLISHED.block_size,
) -> FlexPrefillConfig:
    least = block_size if min_budget is None else min_budget
    return FlexPrefillConfig(gamma, tau, least, max_budget, block_size, "published")


def _computational_ratio(selection: BlockSelection) -> float:
    grid = selection.grid
    return selection.kept_blocks().double().mean().item() / (grid.q_blocks * grid.kv_blocks)


_PATTERNS: dict[str, tuple[Callable[..., Selector | None], dict[str, str]]] = {
    "default": (lambda: None, {}),
    "flex_prefill": (
        _flexprefill,
        {
            "block_size": "block_size",
            "flex_prefill_gamma": "gamma",
            "flex_prefill_tau": "tau",
            "flex_prefill_min_budget": "min_budget",
            "flex_prefill_max_budget": "max_budget",
        },
    ),
    "streaming_llm": (
        StreamingLLMConfig,
        {"block_size": "block_size", "streaming_llm_sink": "sink", "streaming_llm_window": "window"},
    ),
    "vertical_slash": (
        VerticalSlashConfig,
        {
            "block_size": "block_size",
            "vertical_slash_vertical_size": "vertical_size",
            "vertical_slash_slash_size": "slash_size",
        },
    ),
}
"""Pattern -> what makes its selector's config, and which of that one's fields each key is."""

_KEYS = tuple(dict.fromkeys(key for _, fields in _PATTERNS.values() for key in fields))

_REPLACED = {
    "flash": (
        "use pattern 'default', which gives the model its own dense attention back, or "
        "model.set_attn_implementation('flash_attention_2')"
    ),
    "minfer": (
        "use pattern 'vertical_slash' for its vertical-slash heads with fixed budgets, or 'flex_prefill', which "
        "chooses each head's pattern by itself"
    ),
}
_VLLM_REPLACEMENT = (
    "patch_model cannot patch a vLLM engine: make it with this package's attention backend instead, "
    'LLM(model, attention_backend="CUSTOM", additional_config={"sparse_prefill": {"gamma": 0.95}})'
)


def patch_model(model: Any, pattern: str, config: Mapping[str, Any] | None = None) -> Any:
    """Switch a transformers model's prefill to a pattern, or with "default" back to its own dense attention.

    It takes the place of an earlier call and of every `enable_sparse_prefill` on the model: their handles are switched
    off for good. Nothing is patched: the attention goes through transformers' interface, see `enable_sparse_prefill`.
    Decode steps, and prompts of which the pattern keeps every block, are dense.

    Args:
        model: a decoder-only transformers model whose attention goes through the attention interface.
        pattern: "default", "flex_prefill", "streaming_llm" or "vertical_slash".
        config: settings by the published keys; each pattern reads its own, and those of other patterns may stay.
            All but "default" read block_size (tokens, 64 or 128).
            flex_prefill: flex_prefill_gamma, flex_prefill_tau, flex_prefill_min_budget and flex_prefill_max_budget
            (tokens; a min_budget of None means one block).
            streaming_llm: streaming_llm_sink, streaming_llm_window (tokens).
            vertical_slash: vertical_slash_vertical_size, vertical_slash_slash_size (tokens, 8192 each).
            The keys of these two follow the published manner and are this package's own. A key that is left out has
            the default of `FlexPrefillConfig`, `StreamingLLMConfig` or `VerticalSlashConfig`.

    Returns:
        The model itself.

    Raises:
        ValueError: for an unknown pattern or key, a value out of range, or a model that cannot be served.
        TypeError: for what is no transformers model, a pattern that is no string, config that is no mapping, or a
            value of the wrong type. vLLM engines and the patterns "flash" and "minfer" get an error that names the
            replacement.
        ImportError: without transformers.
    """
    if any(kind.__module__.partition(".")[0] == "vllm" for kind in type(model).__mro__):
        raise TypeError(_VLLM_REPLACEMENT)
    chosen = _pattern_config(pattern, config)
    from flexprefill_fa.integrations.hf_plan import check_model
    from flexprefill_fa.integrations.transformers import NAME, SparsePrefill, enable_sparse_prefill

    layers = check_model(model)
    before = SparsePrefill.all_of(model)
    if chosen is not None:
        enable_sparse_prefill(model, chosen)
    for handle in before:
        handle.disable()
    by_name: Any = [module.config for module in layers.values()]
    if chosen is None and any(config._attn_implementation == NAME for config in by_name):  # sparse by their own doing
        enable_sparse_prefill(model, lambda layer: None)
    return model


def _pattern_config(pattern: object, config: Mapping[str, Any] | None) -> Selector | None:
    """The selector of a pattern and its settings, None for dense attention."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be one of {', '.join(_PATTERNS)}, got {type(pattern).__name__}")
    if pattern in _REPLACED:
        raise ValueError(f"pattern {pattern!r} is not here: {_REPLACED[pattern]}")
    if pattern not in _PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(_PATTERNS)}, got {pattern!r}")
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping such as a dict, got {type(config).__name__}")
    given = dict(config or {})
    unknown = [str(key) for key in given if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)} in config, expected of {', '.join(_KEYS)}")
    make, fields = _PATTERNS[pattern]
    try:
        return make(**{field: given[key] for key, field in fields.items() if key in given})
    except (TypeError, ValueError) as error:
        keys = {field: key for key, field in fields.items()}
        raise type(error)(re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), str(error))) from None
