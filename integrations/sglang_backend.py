"""SGLang's own attention backend with sparse prefill in front: `make_backend`, which `sglang.create` calls.

SGLang builds the backend that it would have for prompts without ours, the *parent*. The object stays what it is and
does all it did; its class becomes a subclass of its own, which attends to the long chunks of a step itself.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import (  # pyright: ignore[reportMissingImports]
    ATTENTION_BACKENDS,
)
from sglang.srt.layers.radix_attention import RadixAttention  # pyright: ignore[reportMissingImports]
from torch import Tensor

from flexprefill_fa.backends import resolve_backend

from .engine_settings import Settings
from .sglang_engine import chunk_of, dense_reason, engine_settings_of, in_the_window_pool, parent_name, refusal
from .sglang_plan import is_prefill, layer_problem
from .sglang_prefill import SparsePrefill, log

backends: weakref.WeakSet[Any] = weakref.WeakSet()
"""The sparse backends of this process."""


def make_backend(runner: Any, warning: str | None = None) -> Any:
    """The attention backend of a `ModelRunner`, sparse where it can be.

    Args:
        runner: SGLang's; its model is loaded and its KV pool is there.
        warning: something to say of the engine first.

    Raises:
        ValueError: for a device that is not CUDA's, an engine that `refusal` or `parent_name` names, or a bad setting.
    """
    if runner.device != "cuda":
        raise ValueError(f"the sparse prefill backend is for CUDA GPUs, got {runner.device}")
    parent = parent_name()
    if runner.is_draft_worker:
        return ATTENTION_BACKENDS[parent](runner)
    problem = refusal(runner)
    if problem is not None:
        raise ValueError(problem)
    if warning is not None:
        log.once(runner, warning, logging.WARNING)
    settings = engine_settings_of(runner)
    backend = ATTENTION_BACKENDS[parent](runner)
    reason = dense_reason(runner)
    if reason is not None:
        log.once(runner, f"sparse prefill: {reason}, so {parent} serves this engine alone", logging.WARNING)
        return backend
    layers, dense = sparse_layers(runner)
    for kind in dense:
        log.once(runner, f"sparse prefill: layers with {kind} are served by {parent} alone")
    if not layers:
        text = f"sparse prefill: no layer of this model can run sparse; {parent} serves it alone"
        log.once(runner, text, logging.WARNING)
        return backend
    _say_what_runs(runner, settings, layers, parent)
    rest = ATTENTION_BACKENDS[parent](runner)
    backend.sparse_prefill = SparsePrefill(runner, rest, parent, settings, layers)
    backend.sparse_prefill.warm_up(runner, min(chunk_of(runner), runner.model_config.context_len))
    backend.__class__ = sparse_class(type(backend))
    backends.add(backend)
    return backend


def sparse_layers(runner: Any) -> tuple[dict[Any, str], list[str]]:
    """The layers of a model that can run sparse, with their names; and what the others have, in words."""
    found, dense = {}, []
    for name, module in runner.model.named_modules():
        if isinstance(module, RadixAttention):
            problem = layer_problem(module, runner.dtype)
            if problem is None and in_the_window_pool(runner.token_to_kv_pool, module):
                problem = "a sliding window"
            if problem is None:
                found[module] = name
            else:
                dense.append(problem)
    return found, list(dict.fromkeys(dense))


def _say_what_runs(runner: Any, settings: Settings, layers: dict[Any, str], parent: str) -> None:
    layer, every = next(iter(layers)), sum(isinstance(module, RadixAttention) for module in runner.model.modules())
    device = runner.req_to_token_pool.req_to_token.device
    probe = torch.empty(1, 0, 0, layer.head_dim, dtype=runner.dtype, device=device)
    kernel = resolve_backend(settings.backend, probe, settings.selector.block_size)
    some = f"{len(layers)} of {every} layers run long prefill chunks sparse"
    log.once(runner, f"sparse prefill: {some}, {parent} the rest: {settings.describe(kernel)}")
    remedy = "raise --chunked-prefill-size"
    for line in settings.never_reached(chunk_of(runner), runner.model_config.context_len, remedy):
        log.once(runner, line, logging.WARNING)


@functools.cache
def sparse_class(parent: Any) -> Any:
    """The parent's subclass that attends sparsely to the long prefill chunks of a step.

    All that is ours in its objects has one name, `sparse_prefill`, that no parent has. It has no other base: an object
    changes its class only to one of the same layout.
    """

    class SparsePrefillBackend(parent):
        sparse_prefill: SparsePrefill

        def init_forward_metadata(self, forward_batch: Any) -> None:
            """The parent's plan of a step; and ours, where it has long prefill chunks."""
            super().init_forward_metadata(forward_batch)
            self.sparse_prefill.plan(forward_batch, getattr(self, "forward_metadata", None))

        def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
            """The parent's plan of a captured step, which has no sparse chunks."""
            self.sparse_prefill.step = None
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

        def forward_extend(
            self,
            q: Tensor,
            k: Tensor | None,
            v: Tensor | None,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **extra: Any,
        ) -> Any:
            """A layer of a step: `[rows, Hq * D]` from q `[rows, Hq * D]` and the KV pool.

            What comes in `extra` makes a layer something else than plain causal attention, and is the parent's.
            """
            if is_prefill(forward_batch) and all(value is None or value is False for value in extra.values()):
                output = self.sparse_prefill.forward(q, k, v, layer, forward_batch, save_kv_cache)
                if output is not None:
                    return output
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **extra)

    SparsePrefillBackend.__name__ = f"SparsePrefill{parent.__name__}"
    SparsePrefillBackend.__qualname__ = SparsePrefillBackend.__name__
    return SparsePrefillBackend
