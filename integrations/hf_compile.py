"""The prefill of `generate`, compiled: transformers itself compiles decode steps alone."""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import DynamicCache, PreTrainedModel

from flexprefill_fa.region import compile_limits, nothing_compiles

from .hf_layers import unwrap
from .hf_mask import MIN_QUERY_TOKENS, real_keys

logger = logging.getLogger(__name__)

_MARK = "_compiles_prefill"  # on a forward of ours


class CompiledPrefill:
    """A model whose long prompts run compiled; a context manager, or call `disable()`."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        self._model = model
        self._uncompiled = model.forward
        self._before = vars(model).get("forward")  # where libraries that spread a model over devices put theirs
        self._names = list(inspect.signature(model.forward).parameters)
        self._compiled = torch.compile(model.forward, **{"fullgraph": True, "dynamic": True, **options})

        @functools.wraps(model.forward)  # `generate` looks at its signature
        def forward(*positional: Any, **arguments: Any) -> Any:
            return self._forward(*positional, **arguments)

        setattr(forward, _MARK, True)
        self._installed = model.forward = forward

    def _forward(self, *positional: Any, **arguments: Any) -> Any:
        named = arguments | dict(zip(self._names, positional, strict=False))
        if len(positional) > len(self._names) or not self._is_prefill(named):
            return self._uncompiled(*positional, **arguments)
        cached = _cache_of(named) is not None
        if not cached and self._wants_cache(named):
            # A cache made in a traced model fails on its first tensor.
            name = "cache" if "cache" in self._names else "past_key_values"  # before transformers 5.24 or so
            named[name], cached = DynamicCache(config=self._model.config), True
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor):
            # What a traced model cannot look at: that the mask has no gaps, and that it masks nothing, so that the
            # kernels need not look at padding. Token types stand for masks of their own, which need it.
            whole = real_keys(mask, 0, mask.shape[1]) is None
            plain = all(named.get(name) is None for name in ("token_type_ids", "mm_token_type_ids"))
            if whole and plain and cached:
                named["attention_mask"] = None
        elif not cached and named.get("position_ids") is None:
            # A traced model with neither a cache nor a mask looks for packed sequences, which cannot be here.
            tokens = _tokens_of(named)
            named["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        with compile_limits():
            return self._compiled(**named)

    def _is_prefill(self, arguments: dict[str, Any]) -> bool:
        from .transformers import NAME

        if torch.compiler.is_dynamo_compiling() or nothing_compiles():
            return False
        if self._model.config._attn_implementation != NAME:
            return False
        tokens = _tokens_of(arguments)
        if not isinstance(tokens, Tensor) or tokens.shape[1] < MIN_QUERY_TOKENS:
            return False
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return False
        cache = _cache_of(arguments)
        if getattr(cache, "is_compileable", False) and getattr(cache, "max_cache_len", -1) > 0:
            logger.debug("a static cache: the prefill runs uncompiled")
            return False
        return True

    def _wants_cache(self, arguments: dict[str, Any]) -> bool:
        asked = arguments.get("use_cache")
        if asked is None:
            asked = getattr(self._model.config.get_text_config(decoder=True), "use_cache", False)
        return bool(asked)

    def disable(self) -> None:
        """Give the model the forward back that it had; a second call does nothing."""
        if vars(self._model).get("forward") is not self._installed:
            return
        if self._before is None:
            del self._model.forward
        else:
            self._model.forward = self._before

    def __enter__(self) -> CompiledPrefill:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def _tokens_of(arguments: dict[str, Any]) -> Any:
    """Token ids `[B, n]` or embeddings `[B, n, D]`, None where there are none."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _cache_of(arguments: dict[str, Any]) -> Any:
    """By its name, or by the one that it had before transformers 5.24 or so."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def compile_prefill(model: nn.Module, **options: Any) -> CompiledPrefill:
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
        TypeError, ValueError: for a model without sparse prefill, one that is compiled already, or one that is spread
            over devices by `device_map`.
    """
    from .transformers import NAME

    if isinstance(model, OptimizedModule):
        raise ValueError(
            f"this {type(unwrap(model)).__name__} is compiled already, by torch.compile, prefill and decode"
        )
    model = unwrap(model)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            "compile_prefill is for sparse prefill: call enable_sparse_prefill first; "
            f"the model's attention is {model.config._attn_implementation!r}"
        )
    if hasattr(model.forward, _MARK):
        raise ValueError(f"the prefill of this {type(model).__name__} is compiled already")
    if options.get("fullgraph", True) and any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"the prefill of this {type(model).__name__} cannot be compiled as one graph: expected a model on one "
            f"device or shared out by tp_plan, got one spread by device_map over {_devices(model)}"
        )
    return CompiledPrefill(model, options)


def _devices(model: PreTrainedModel) -> str:
    """Those of its device_map, where a number is a GPU."""
    found = dict.fromkeys(getattr(model, "hf_device_map", {}).values())
    return ", ".join(f"cuda:{device}" if isinstance(device, int) else str(device) for device in found)
