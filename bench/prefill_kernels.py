"""Dense attention in a transformers model by the kernel's name, compiled or not, and what each layer's attention costs.

transformers' own "sdpa" would do for one of them, but not inside a compiled model: traced, it builds a mask of n x n.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.timing import Timer
from flexprefill_fa.dense import DENSE_KERNELS, causal_attention
from flexprefill_fa.region import compile_limits


def implementation(kernel: str) -> str:
    """The name under which a model takes a dense kernel as its attention."""
    return f"bench_{DENSE_KERNELS.index(kernel)}"  # names that hold "sdpa" or "flash" are taken for transformers' own


def _attention(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out = causal_attention(query, key, value, kernel, scale=kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    return attend


for _kernel in DENSE_KERNELS:
    AttentionInterface.register(implementation(_kernel), _attention(_kernel))
    AttentionMaskInterface.register(implementation(_kernel), lambda *_, **__: None)  # whole prompts need no mask


@contextmanager
def dense_prefill(model: PreTrainedModel, kernel: str, compiled: bool) -> Iterator[None]:
    """Let every layer of a model attend by a kernel of `DENSE_KERNELS` inside a context; whole prompts without padding.

    The forward pass is compiled as `compile_prefill` does it for the sparse model, or not at all.
    """
    before: Any = model.config._attn_implementation
    plain = model.forward
    graph = torch.compile(plain, fullgraph=True, dynamic=True)

    @functools.wraps(plain)  # `generate` looks at its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = None  # all ones
        with compile_limits():
            return graph(*args, **kwargs)

    model.set_attn_implementation(implementation(kernel))
    if compiled:
        model.forward = forward
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        model.set_attn_implementation(before)


@contextmanager
def timed_attention(name: str, timer: Timer) -> Iterator[None]:
    """Time every call of an attention implementation inside a context; in uncompiled models alone."""
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def timed(*args: Any, **kwargs: Any) -> Any:
        with timer.once():
            return attend(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = timed  # for this instance alone, in front of what is registered
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
