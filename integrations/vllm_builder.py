"""The builder of a step's attention metadata: the parent backend's, or a `SparseStep` where a step has long chunks."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.backend import (  # pyright: ignore[reportMissingImports]
    AttentionCGSupport,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec  # pyright: ignore[reportMissingImports]

from flexprefill_fa.backends import resolve_backend

from .engine_counts import DensityLog
from .engine_layer import FAILURES_IN_A_ROW
from .vllm_config import engine_settings_of, longest_chunk
from .vllm_log import log_once, logger
from .vllm_plan import SparseStep, declined_chunks, sparse_step, split_step, step_problem
from .vllm_version import spec_problem


class SparsePrefillBuilder(AttentionMetadataBuilder):
    """The parent's builder for steps without long prefill chunks; others it splits, see `SparseStep`."""

    parent_class: Any
    parent_name: str
    own_class: Any  # the class that `backend_for` made; vLLM derives others from it, which rearrange requests
    supports_update_block_table = False  # a step's chunks hold parts of the block table

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **extra: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **extra)
        self._config = vllm_config
        self._settings = engine_settings_of(vllm_config)
        layers: Any = get_layers_from_vllm_config(vllm_config, torch.nn.Module, layer_names)
        impls = [layer.impl for layer in layers.values()]
        self._impls = [impl for impl in impls if getattr(impl, "sparse_counter", None) is not None]
        self._counters = [impl.sparse_counter for impl in self._impls]
        self._log = DensityLog(self._counters, self._settings.log_seconds)
        self._failures = 0  # in a row
        reason = _group_problem(kv_cache_spec, vllm_config)
        if type(self) is not self.own_class:
            reason = f"{type(self).__name__} rearranges the requests of a step"
        self._runs_sparse = bool(self._impls) and reason is None
        self._say_what_runs(reason, len(impls), vllm_config, device)
        # The parent's builder may keep buffers for one step's metadata: metadata for all requests beside that for a
        # part of them needs a second one. It is made now, because a forward that fails needs it at once.
        arguments = (kv_cache_spec, layer_names, vllm_config, device)
        self._dense_builder = self.parent_class(*arguments, **extra) if self._runs_sparse else None

    def _say_what_runs(self, reason: str | None, layers: int, vllm_config: Any, device: torch.device) -> None:
        parent, settings = self.parent_name, self._settings
        if self._runs_sparse:
            some = f"{len(self._impls)} of {layers} layers run long prefill chunks sparse"
            dtype = vllm_config.model_config.dtype
            probe = torch.empty(1, 0, 0, self._impls[0].head_size, dtype=dtype, device=device)
            kernel = resolve_backend(settings.backend, probe, settings.selector.block_size)
            log_once(vllm_config, f"sparse prefill: {some}, {parent} the rest: {settings.describe(kernel)}")
            self._warn_of_short_chunks(vllm_config)
        elif self._impls:
            text = f"sparse prefill: {reason}, so {parent} serves these layers alone"
            log_once(vllm_config, text, logging.WARNING)
        else:
            context = vllm_config.compilation_config.static_forward_context.values()
            counters = [getattr(getattr(layer, "impl", None), "sparse_counter", None) for layer in context]
            if all(counter is None for counter in counters):
                text = f"sparse prefill: no layer of this model can run sparse; {parent} serves it alone"
                log_once(vllm_config, text, logging.WARNING)

    def _warn_of_short_chunks(self, vllm_config: Any) -> None:
        chunk, prompt = longest_chunk(vllm_config.scheduler_config), vllm_config.model_config.max_model_len
        remedy = "raise max_num_batched_tokens or long_prefill_token_threshold"
        for line in self._settings.never_reached(chunk, prompt, remedy):
            log_once(vllm_config, line, logging.WARNING)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """At most single-token decode: a full graph of a mixed batch would replay dense prefill, in silence."""
        inherited = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(inherited, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda support: support.value)

    def use_cascade_attention(self, common_prefix_len: int, query_lens: Any, *args: Any, **kwargs: Any) -> bool:
        """Not in steps that may have sparse chunks: its metadata is for all requests together."""
        if self._runs_sparse and int(query_lens.max()) >= self._settings.min_prefill_tokens:
            return False
        return super().use_cascade_attention(common_prefix_len, query_lens, *args, **kwargs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **extra: Any) -> Any:
        """The parent's metadata, or a `SparseStep`; `extra` is for parents that take more, and their steps stay whole.

        The layers of a draft model stay dense whichever they are given: vLLM's second model runner hands them the
        target's metadata for their prefill, its first one builds theirs with `fast_build`.
        """
        if self._runs_sparse and not common_prefix_len and not fast_build and not extra:
            step = self._build_sparse(common_attn_metadata)
            if step is not None:
                return step
        return super().build(common_prefix_len, common_attn_metadata, fast_build, **extra)

    def _build_sparse(self, common_attn_metadata: Any) -> SparseStep | None:
        """None where nothing runs sparse; and where this failed, for an exception here would end the engine."""
        try:
            line = self._log.poll(time.monotonic())
            if line is not None:
                logger.info("%s", line)
            if all(impl.sparse_off for impl in self._impls):
                self._runs_sparse = False
                return None
            split = split_step(common_attn_metadata, self._settings)
            declined = declined_chunks(common_attn_metadata, split, self._settings)
            for counter in self._counters if declined else ():
                counter.declined += declined
            if split is None:
                problem = step_problem(common_attn_metadata) if declined else None
                if problem is not None:
                    text = f"sparse prefill: steps with {problem} are served by {self.parent_name} alone"
                    log_once(self._config, text, logging.WARNING)
                return None
            build = super().build
            dense: Any = self._dense_builder
            step = sparse_step(
                common_attn_metadata,
                split,
                self.kv_cache_spec.block_size,
                lambda rest: build(0, rest),
                lambda: dense.build(0, common_attn_metadata),
            )
        except Exception:
            self._failures += 1
            logger.exception("sparse prefill failed to split a step; %s serves it", self.parent_name)
            if self._failures >= FAILURES_IN_A_ROW:
                self._runs_sparse = False
                logger.error("sparse prefill is off until the engine ends: %d steps failed in a row", self._failures)
            return None
        self._failures = 0
        return step


def _group_problem(kv_cache_spec: Any, vllm_config: Any) -> str | None:
    """Why no layer of a group can run sparse, or None."""
    parallel = vllm_config.parallel_config
    # Exactly: subclasses, and the builders that vLLM derives for them, rearrange the requests of a step.
    if type(kv_cache_spec) is not FullAttentionSpec or kv_cache_spec.attention_chunk_size is not None:
        return f"the KV cache is a {type(kv_cache_spec).__name__} with rules of its own"
    if getattr(kv_cache_spec, "non_causal", False):
        return "attention is not causal"
    problem = spec_problem(kv_cache_spec)
    if problem is not None:
        return problem
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism spreads the keys of a request"
    if parallel.use_ubatching:
        return "micro-batches split the chunks"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "kv_sharing_fast_prefill leaves out queries"
    return None
