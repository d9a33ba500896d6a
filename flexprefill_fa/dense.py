"""Dense causal attention: for prompts too short to gain from sparsity, and as the yardstick."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from flexprefill_fa.backends import compute_capability, flash_problem, kernel_options, resolve_backend
from flexprefill_fa.block_mask import needs_position
from flexprefill_fa.flash import flash_causal
from flexprefill_fa.grid import real_ranges
from flexprefill_fa.region import run_attend_causal
from flexprefill_fa.validation import check_query_key, check_scale, check_value

# The largest square mask that dense attention may build: 64 MB per batch element.
MAX_DENSE_MASK_TOKENS = 8192
_ROWS_AT_ONCE = 512  # queries whose scores `attention_with_extras` holds
_BLOCK_SIZE = 128  # of FlexAttention's all-causal mask
_FLASH_TOKENS = 2048  # prompts from which flash-attn-4 is taken
_SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
DENSE_KERNELS = ("sdpa", *_SDPA, "flash_attn_4", "FLASH", "TRITON", "CPU")


def fastest_dense(query: Tensor) -> str:
    """The dense causal kernel to take for a whole prompt `[B, Hq, L, D]`, by name.

    flash-attn-4 where it runs and the prompt is long enough to be worth its launch; else PyTorch's choice. On Hopper
    cuDNN is about as fast, but plans for some 40 ms at each new length. A traced model, where the length is unknown,
    takes PyTorch's choice, and so does a mode that sees every operator: it sees none of flash-attn-4's.
    """
    if not query.is_cuda or torch.compiler.is_dynamo_compiling() or query.shape[2] < _FLASH_TOKENS:
        return "sdpa"
    if is_in_torch_dispatch_mode():
        return "sdpa"
    measured = compute_capability(query.device.index) == (9, 0)
    return "flash_attn_4" if measured and flash_problem(query, _BLOCK_SIZE) is None else "sdpa"


def dense_mask_fits(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    mask_mod: Callable[..., Tensor] | None = None,
) -> bool:
    """Whether `dense_attention` needs no mask for this call, or one small enough to hold."""
    return (
        (mask_mod is None and not needs_position(query, key, starts, lengths))
        or query.shape[2] * key.shape[2] <= MAX_DENSE_MASK_TOKENS**2
        or query.shape[2] == 1
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    mask_mod: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Dense causal attention, for short prompts and decode steps. Rows of padded queries mean nothing.

    Padding, a cached prefix or a mask_mod needs a mask `[B, 1, Lq, Lkv]`: keep Lq or Lkv short.
    """
    gqa = query.shape[1] != key.shape[1]
    q_len, kv_len = query.shape[2], key.shape[2]
    if starts is None and lengths is None and mask_mod is None:
        if q_len == 1:
            return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=gqa)
        if q_len == kv_len:
            return _causal_attention(query, key, value, fastest_dense(query), scale)
    mask = _causal_mask(query, key, 0, q_len, starts, lengths, mask_mod)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _causal_mask(
    query: Tensor,
    key: Tensor,
    first: int,
    end: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    mask_mod: Callable[..., Tensor] | None,
) -> Tensor:
    """bool `[B, 1, end - first, Lkv]` of queries first ... end - 1."""
    kv_len, device = key.shape[2], query.device
    ranges = real_ranges(starts, lengths, query.shape[0], kv_len, device)
    kv_position = torch.arange(kv_len, device=device)
    row = torch.arange(first, end, device=device)
    q_position = kv_len - query.shape[2] + row
    # A padded query sees at least one key (its own position or, before the first real key, key 0): never 0 / 0.
    real = (kv_position >= ranges[:, :1]) & (kv_position < ranges[:, 1:])
    alone = (q_position < ranges[:, :1])[:, :, None] & (kv_position == 0)
    mask = (kv_position <= q_position[:, None]) & real[:, None]
    if mask_mod is not None:
        batch = torch.arange(query.shape[0], device=device)[:, None, None]
        mask = mask & mask_mod(batch, 0, row[:, None], kv_position)
    return (mask | alone)[:, None]


def attention_with_extras(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Dense attention by its definition, for what no kernel takes: capped scores and attention sinks on short inputs.

    Scores of at most `_ROWS_AT_ONCE` queries are in memory at a time.

    Args:
        query: `[B, Hq, Lq, D]`. key: `[B, Hkv, Lkv, D]`. value: `[B, Hkv, Lkv, Dv]`.
        mask: bool or additive `[B or 1, Hq or 1, Lq, Lkv]`, or `[Lq, Lkv]`; None for the causal one of queries that are
            the last of the keys.
        scale: score scale, default 1/sqrt(D).
        softcap: scores become softcap * tanh(score / softcap).
        sinks: `[Hq]`, a score per head that takes its share of the softmax and gives no value.
        starts, lengths, mask_mod: of the causal mask, as in `dense_attention`.

    Returns:
        `[B, Hq, Lq, Dv]`.
    """
    groups = query.shape[1] // key.shape[1]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
    parts = []
    # A traced length is not compared with a number: all rows at once.
    step = query.shape[2] if torch.compiler.is_dynamo_compiling() else _ROWS_AT_ONCE
    for first in range(0, query.shape[2], step):
        end = min(first + step, query.shape[2])
        scores = (query[:, :, first:end] @ keys.mT).float() * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is None:
            seen = _causal_mask(query, key, first, end, starts, lengths, mask_mod)
        else:
            seen = mask[..., first:end, :]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        if sinks is not None:
            column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., : keys.shape[2]].nan_to_num(0.0)  # a row that sees nothing
        parts.append(weights.to(values.dtype) @ values)
    return torch.cat(parts, 2)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: str = "sdpa", *, scale: float | None = None
) -> Tensor:
    """Dense causal attention of a whole prompt by a named kernel.

    Args:
        query: `[B, Hq, L, D]`. key, value: `[B, Hkv, L, D]`.
        kernel: "sdpa" (PyTorch's choice), "sdpa_flash" or "sdpa_cudnn"; "flash_attn_4"; "FLASH" (the same kernel),
            "TRITON" or "CPU" for FlexAttention over every causal block.
        scale: score scale, default 1/sqrt(D).

    Returns:
        `[B, Hq, L, D]`.

    Raises:
        ValueError: for an unknown kernel, or one that cannot run this call.
    """
    check_query_key(query, key)
    check_value(key, value)
    check_scale(scale)
    if kernel not in DENSE_KERNELS:
        raise ValueError(f"kernel must be one of {DENSE_KERNELS}, got {kernel!r}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"dense causal attention needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}"
        )
    return _causal_attention(query, key, value, kernel, scale)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str, scale: float | None) -> Tensor:
    """`causal_attention` on checked arguments."""
    gqa = query.shape[1] != key.shape[1]
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    if kernel in _SDPA:
        if not query.is_cuda:
            raise ValueError(f"kernel={kernel!r} needs a CUDA GPU, got tensors on {query.device}")
        with sdpa_kernel(_SDPA[kernel]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    if kernel == "flash_attn_4":
        if problem := flash_problem(query, _BLOCK_SIZE):
            raise ValueError(f"kernel='flash_attn_4' cannot run: {problem}")
        return flash_causal(query, key, value, scale)
    resolved = resolve_backend(kernel, query, _BLOCK_SIZE)
    options = kernel_options(resolved, query, key, _BLOCK_SIZE)
    return run_attend_causal(query, key, value, block_size=_BLOCK_SIZE, scale=scale, options=options)
