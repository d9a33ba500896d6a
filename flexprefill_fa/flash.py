"""Dense causal attention by flash-attn-4 itself.

FlexAttention reaches the same kernel by lists of every block and a mask that is made and looked up anew at each call,
which costs the CPU more than a short prompt costs the GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: where the kernel's rows begin


@functools.cache
def _flash_attn_func() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]  # an extra, slow to import

    return flash_attn_func


def flash_causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of a whole prompt, where `backends.flash_problem` names no problem.

    Args:
        query: `[B, Hq, L, D]`. key, value: `[B, Hkv, L, D]`.
        scale: score scale, None for 1/sqrt(D).

    Returns:
        `[B, Hq, L, D]`, in memory as `[B, L, Hq, D]`.
    """
    rows = [_aligned(x).transpose(1, 2) for x in (query, key, value)]
    found = _flash_attn_func()(*rows, softmax_scale=scale, causal=True)
    out = found[0] if isinstance(found, tuple) else found  # with or without the log-sum-exp, by its version
    return out.transpose(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """The tensor, copied where a row of it begins at an address that the kernel cannot read from."""
    step = _ALIGNED // x.element_size()
    *outer, last = x.stride()
    if last == 1 and x.data_ptr() % _ALIGNED == 0 and not any(stride % step for stride in outer):
        return x
    return x.clone(memory_format=torch.contiguous_format)
