"""Dense attention in a transformers model by the kernel's name, compiled or not, and what each layer's attention costs.

transformers' own "sdpa" would do for one of them, but not inside a compiled model: traced, it builds a mask of n x n.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.timing import Timer
from flexprefill_fa.dense import DENSE_KERNELS, causal_attention
from flexprefill_fa.region import compile_limits


def implementation(kernel: str) -> str:
    """The name under which a model takes a dense kernel as its attention; whole prompts without padding only."""
    return f"bench_{DENSE_KERNELS.index(kernel)}"  # names that hold "sdpa" or "flash" are taken for transformers' own


def _attention(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out = causal_attention(query, key, value, kernel, scale=kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    return attend


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Whole prompts need none."""


for _kernel in DENSE_KERNELS:
    AttentionInterface.register(implementation(_kernel), _attention(_kernel))
    AttentionMaskInterface.register(implementation(_kernel), _no_mask)


class DensePrefill:
    """A model, for whole prompts without padding, that can take dense kernels as its attention.

    What was compiled for one is kept for its next time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._graphs: dict[str, Callable[..., Any]] = {}

    @contextmanager
    def installed(self, kernel: str, compiled: bool) -> Iterator[None]:
        """Let every layer attend by a kernel of `DENSE_KERNELS` inside a context, the forward pass compiled or not."""
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(implementation(kernel))
        try:
            with self._compiled(kernel) if compiled else nullcontext():
                yield
        finally:
            self._model.set_attn_implementation(before or "sdpa")

    @contextmanager
    def _compiled(self, kernel: str) -> Iterator[None]:
        """As `compile_prefill` does it for the sparse model."""
        plain = self._model.forward
        if kernel not in self._graphs:
            self._graphs[kernel] = torch.compile(plain, fullgraph=True, dynamic=True)
        graph = self._graphs[kernel]

        @functools.wraps(plain)  # `generate` looks at its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs["attention_mask"] = None  # all ones
            with compile_limits():
                return graph(*args, **kwargs)

        self._model.forward = forward
        try:
            yield
        finally:
            del self._model.forward


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
