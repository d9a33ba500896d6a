"""The prefill of `generate`, compiled: transformers itself compiles decode steps alone."""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexprefill_fa.region import compile_limits

from .hf_mask import MIN_QUERY_TOKENS

logger = logging.getLogger(__name__)


class CompiledPrefill:
    """A model whose long prompts run compiled; a context manager, or call `disable()`."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        self._model = model
        self._uncompiled = model.forward
        self._names = list(inspect.signature(model.forward).parameters)
        self._compiled = torch.compile(model.forward, **{"fullgraph": True, "dynamic": True, **options})

        @functools.wraps(model.forward)  # `generate` looks at its signature
        def forward(*positional: Any, **arguments: Any) -> Any:
            return self._forward(*positional, **arguments)

        model.forward = forward

    def _forward(self, *positional: Any, **arguments: Any) -> Any:
        arguments |= dict(zip(self._names, positional, strict=False))
        if not self._is_prefill(arguments):
            return self._uncompiled(**arguments)
        mask = arguments.get("attention_mask")
        # The compiler cannot see that a mask masks nothing; without one the kernels need not look at padding.
        if isinstance(mask, Tensor) and arguments.get("past_key_values") is not None and bool(mask.all()):
            arguments["attention_mask"] = None
        with compile_limits():
            return self._compiled(**arguments)

    def _is_prefill(self, arguments: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling():  # inside another compiled call
            return False
        tokens = next(
            (arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None), None
        )
        if not isinstance(tokens, Tensor) or tokens.shape[1] < MIN_QUERY_TOKENS:
            return False
        cache = arguments.get("past_key_values")
        if getattr(cache, "is_compileable", False) and getattr(cache, "max_cache_len", -1) > 0:
            logger.debug("a static cache: the prefill runs uncompiled")
            return False
        return True

    def disable(self) -> None:
        """Give the model its own forward back; a second call does nothing."""
        if vars(self._model).get("forward") is not None:
            del self._model.forward

    def __enter__(self) -> CompiledPrefill:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def compile_prefill(model: PreTrainedModel, **options: Any) -> CompiledPrefill:
    """Compile the forward pass of long prompts, for `generate` and direct calls.

    One graph serves prompts of every length; padding, a cached prefix and prompts below `min_prompt_tokens` have one
    each. Decode steps, chunks of fewer than 128 tokens and prompts with a static cache run as they did, and decode may
    be compiled by `generate` as before.

    Args:
        model: with sparse prefill switched on, by `enable_sparse_prefill` or attn_implementation="flexprefill".
        options: for `torch.compile`; fullgraph and dynamic are True by default.

    Returns:
        A handle: a context manager that restores the model on exit, with `disable()`.

    Raises:
        TypeError, ValueError: for a model without sparse prefill, or one that is compiled already.
    """
    from .transformers import NAME

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if model.config._attn_implementation != NAME:
        raise ValueError(
            "compile_prefill is for sparse prefill: call enable_sparse_prefill first; "
            f"the model's attention is {model.config._attn_implementation!r}"
        )
    if "forward" in vars(model):
        raise ValueError(f"the forward of this {type(model).__name__} is replaced already")
    return CompiledPrefill(model, options)
