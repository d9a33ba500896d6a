"""One attention layer in vLLM: the parent backend's, which attends to the long chunks of a `SparseStep` itself."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.backend import AttentionImpl, AttentionType  # pyright: ignore[reportMissingImports]

from flexprefill_fa.selection import BlockSelection

from .engine_counts import DensityCounter
from .engine_layer import SparseLayer
from .engine_paged import GatherBuffer, attend_paged, warm_up
from .engine_plan import take
from .engine_settings import Settings
from .vllm_config import engine_settings_of
from .vllm_log import log_once, logger
from .vllm_plan import SparseStep, layer_problem
from .vllm_version import CacheLayout

# Parents that read keys and values from the cache alone, where decoders are concerned: they need no copies of them.
_READ_THE_CACHE = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
# What vLLM calls the model that it loads while a speculative decoder's own model is made, unless it is some "_head".
_DRAFT_TAGS = ("draft_model", "extract_hidden_states", "dflash2_candidate_selector")


class SparsePrefillImpl(SparseLayer, AttentionImpl):
    """The parent's layer, which attends sparsely in a `SparseStep`.

    Attributes:
        gather_buffer: for its keys and values, shared with the engine's layers of the same shape.
    """

    cache_layout: CacheLayout
    parent_name: str
    own_class: Any

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: Any = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        parent: Any = super()
        parent.__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )
        config = get_current_vllm_config()
        self._settings: Settings = engine_settings_of(config)
        self._max_keys: int = config.model_config.max_model_len
        self._cache_config = config.cache_config
        reason = layer_problem(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap, extra=extra
        )
        if type(self) is not self.own_class:
            reason = f"the class {type(self).__name__}"
        if _of_a_draft_model():
            reason = "a draft model"
        if reason is not None:
            log_once(config, f"sparse prefill: layers with {reason} are served by the parent backend alone")
        self.sparse_counter = DensityCounter() if reason is None else None
        self.sparse_shape = (num_heads, num_kv_heads, head_size, scale) if reason is None else None
        layers = config.compilation_config.static_forward_context.values()
        others: list[Any] = [getattr(layer, "impl", None) for layer in layers]
        others = [impl for impl in others if getattr(impl, "sparse_shape", None) is not None]
        # One layer of each shape compiles for all: they share the compiled code.
        self._warms_up = reason is None and not any(impl.sparse_shape == self.sparse_shape for impl in others)
        alike = (impl.gather_buffer for impl in others if impl.sparse_shape[1:3] == (num_kv_heads, head_size))
        self.gather_buffer: GatherBuffer = next(alike, None) or GatherBuffer()

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Not for sparse layers, whose output is not quantised."""
        return self.sparse_counter is None and super().fused_output_quant_supported(quant_key)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill `output` `[tokens, Hq, D]` from query `[tokens, Hq, D]` and the paged cache, and return it."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None and self._warms_up:
            self._warm_up(query)
        if not isinstance(attn_metadata, SparseStep):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if self._attend_chunks(layer, query, kv_cache, attn_metadata, output):
            self._attend_rest(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        return super().forward(layer, query, key, value, kv_cache, attn_metadata.dense, output, *scales)

    def _warm_up(self, query: Tensor) -> None:
        """In the run by which vLLM measures what a step needs: compile, and take our memory for good."""
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._warms_up = False
        start = time.monotonic()
        page = self._cache_config.block_size or 1
        room = -(-self._max_keys // page) * page
        chunks = warm_up(query, self.num_kv_heads, self._max_keys, room, self._settings, self.scale, self.gather_buffer)
        logger.info("sparse prefill: compiled and ran %d chunks in %.1f s", chunks, time.monotonic() - start)

    def _attend_chunks(self, layer: Any, query: Tensor, kv_cache: Tensor, step: SparseStep, output: Tensor) -> bool:
        """The sparse chunks of a step; False where the parent has to serve it."""

        def attend_one(index: int) -> tuple[Tensor, BlockSelection]:
            chunk = step.chunks[index]
            keys, values = self.cache_layout.split(kv_cache)
            return attend_paged(
                query[chunk.start : chunk.end], keys, values, step.blocks[index], chunk.kv_len, self._settings,
                self.scale, self.gather_buffer, self.attend,
            )  # fmt: skip

        return self.attend_chunks(step.chunks, attend_one, output, getattr(layer, "layer_name", "a layer"), logger)

    def _attend_rest(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        step: SparseStep,
        output: Tensor,
    ) -> None:
        """The other requests of a step, by the parent."""
        rows = step.rows
        if rows is None:
            return
        mine = output[rows] if isinstance(rows, slice) else output.new_empty(len(rows), *output.shape[1:])
        if isinstance(rows, slice) or self.parent_name not in _READ_THE_CACHE:
            key, value = take(key, rows), take(value, rows)
        super().forward(layer, take(query, rows), key, value, kv_cache, step.rest, mine)
        if not isinstance(rows, slice):
            output.index_copy_(0, rows, mine)


def _of_a_draft_model() -> bool:
    """Whether the layer that is being made belongs to a draft model: vLLM leaves a tag while it loads one."""
    tag = getattr(sys.modules.get("vllm.compilation.backends"), "model_tag", None)
    return isinstance(tag, str) and (tag in _DRAFT_TAGS or tag.endswith("_head"))
