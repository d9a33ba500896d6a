"""Dense attention in a transformers model by the kernel's name, compiled or not, and what each layer's attention costs.

transformers' own "sdpa" would do for one of them, but not inside a compiled model: traced, it builds a mask of n x n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.laps import Laps
from flexprefill_fa.dense import DENSE_KERNELS, causal_attention


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


@contextmanager
def timed_attention(name: str, laps: Laps) -> Iterator[None]:
    """Time every call of an attention implementation inside a context; in uncompiled models alone."""
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def timed(*args: Any, **kwargs: Any) -> Any:
        with laps.lap():
            return attend(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = timed  # for this instance alone, in front of what is registered
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
