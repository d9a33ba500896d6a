"""The classes that vLLM loads: its own backend for a model and GPU, with sparse prefill in front.

vLLM asks `SparsePrefillBackend`, registered as CUSTOM, about each kind of layer. It asks vLLM in turn which backend it
would have been without CUSTOM, the *parent*, and answers with a subclass of that, or, for layers that cannot run
sparse, with the parent itself. Only vLLM imports this module.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import torch
from torch import Tensor
from vllm.config import (  # pyright: ignore[reportMissingImports]
    get_current_vllm_config,
    get_layers_from_vllm_config,
)
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.utils.import_utils import resolve_obj_by_qualname  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.backend import (  # pyright: ignore[reportMissingImports]
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.selector import AttentionSelectorConfig  # pyright: ignore[reportMissingImports]
from vllm.v1.kv_cache_interface import FullAttentionSpec  # pyright: ignore[reportMissingImports]
from vllm.version import __version__ as vllm_version  # pyright: ignore[reportMissingImports]

from .vllm_config import Settings, read_settings, version_problem
from .vllm_paged import DensityCounter, DensityLog, attend_chunk, attend_paged, key_value_dim, warm_up
from .vllm_plan import SparseStep, backend_problem, layer_problem, sparse_step, split_step, take

logger = logging.getLogger("vllm.flexprefill_fa")


@functools.cache
def _say(text: str, engine: int = 0) -> None:
    """Once in a process, or for an engine, by the id of its config."""
    logger.info("%s", text)


class SparsePrefillBackend(AttentionBackend):
    """What CUSTOM is registered as; no layer ever gets this class itself."""

    _answer: tuple[str, str]

    @classmethod
    def validate_configuration(cls, device_capability: Any, **asked: Any) -> list[str]:
        """Choose the class for layers of this kind; vLLM asks for its name, `full_cls_name`, right after.

        Raises:
            ValueError: for a version of vLLM that is not served, a GPU that is not CUDA's, or a bad setting.
        """
        problem = version_problem(vllm_version)
        if problem is None and not current_platform.is_cuda():
            problem = f"the sparse prefill backend is for CUDA GPUs, got {current_platform.device_name}"
        if problem is not None:
            raise ValueError(problem)
        read_settings(get_current_vllm_config().additional_config)  # a bad one is an error before any layer is made
        path = current_platform.get_attn_backend_cls(None, AttentionSelectorConfig(**asked), None)
        parent = resolve_obj_by_qualname(path)
        reason = backend_problem(**asked) or _parent_problem(parent)
        if reason is not None:
            _say(f"sparse prefill: layers with {reason} are served by {parent.get_name()} alone")
            cls._answer = parent.full_cls_name()
            return []
        cls._answer = backend_for(parent).full_cls_name()
        return []

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and name of what the latest `validate_configuration` chose."""
        return cls._answer


def _parent_problem(parent: Any) -> str | None:
    if parent.forward_includes_kv_cache_update:
        return f"a KV cache that {parent.get_name()} writes in its forward"
    if key_value_dim(parent.get_kv_cache_shape) is None:
        return f"the KV cache layout of {parent.get_name()}"
    return None


@functools.cache
def backend_for(parent: Any) -> Any:
    """The parent's subclass with sparse prefill, under a name in this module by which vLLM finds it."""
    name = f"SparsePrefill{parent.__name__}"
    here = {"__module__": __name__}
    dim = key_value_dim(parent.get_kv_cache_shape)
    impl = type(f"{name}Impl", (SparsePrefillImpl, parent.get_impl_cls()), {**here, "key_value_dim": dim})
    builder_class = parent.get_builder_cls()
    of_parent = {"parent_class": builder_class, "parent_name": parent.get_name()}
    builder = type(f"{name}Builder", (SparsePrefillBuilder, builder_class), {**here, **of_parent})
    methods = {
        "get_name": staticmethod(lambda: "CUSTOM"),  # vLLM looks it up among its own names
        "get_impl_cls": staticmethod(lambda: impl),
        "get_builder_cls": staticmethod(lambda: builder),
    }
    globals()[name] = backend = type(name, (parent,), {**here, **methods})
    return backend


class SparsePrefillBuilder(AttentionMetadataBuilder):
    """The parent's builder for steps without long prefill chunks; others it splits, see `SparseStep`."""

    parent_class: Any
    parent_name: str
    supports_update_block_table = False  # a step's chunks hold parts of the block table

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._settings = read_settings(vllm_config.additional_config)
        self._arguments = (kv_cache_spec, layer_names, vllm_config, device)
        layers: Any = get_layers_from_vllm_config(vllm_config, torch.nn.Module, layer_names)
        impls = [layer.impl for layer in layers.values()]
        counters = [impl.sparse_counter for impl in impls if impl.sparse_counter is not None]
        self._log = DensityLog(counters, self._settings.log_seconds)
        reason = _group_problem(kv_cache_spec, vllm_config)
        self._runs_sparse = bool(counters) and reason is None
        parent = self.parent_name
        if counters and reason is not None:
            _say(f"sparse prefill: {reason}, so {parent} serves these layers alone", id(vllm_config))
        elif counters:
            layers_sparse = f"{len(counters)} of {len(impls)} layers run long prefill chunks sparse"
            _say(f"sparse prefill: {layers_sparse}, {parent} the rest: {self._settings.describe()}", id(vllm_config))
        # The parent's builder may keep buffers for one step's metadata: metadata for all requests beside that for a
        # part of them needs a second one.
        mixed = self._runs_sparse and len(counters) < len(impls)
        self._dense_builder = self._make_parent() if mixed else None
        self._warn_if_nothing_is_long(vllm_config)

    def _warn_if_nothing_is_long(self, vllm_config: Any) -> None:
        step = vllm_config.scheduler_config.max_num_batched_tokens
        prompt = vllm_config.model_config.max_model_len
        least = self._settings
        if self._runs_sparse and (step < least.min_prefill_tokens or prompt < least.min_prompt_tokens):
            logger.warning(
                "sparse prefill: nothing will run sparse: chunks have at most %d queries (min_prefill_tokens is %d) "
                "and prompts at most %d tokens (min_prompt_tokens is %d)",
                *(step, least.min_prefill_tokens, prompt, least.min_prompt_tokens),
            )

    def _make_parent(self) -> Any:
        return self.parent_class(*self._arguments)

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

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The parent's metadata, or a `SparseStep`. Drafts of speculative decoding (`fast_build`) stay dense."""
        split = None
        if self._runs_sparse and not common_prefix_len and not fast_build:
            split = split_step(common_attn_metadata, self._settings)
        if split is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        line = self._log.poll(time.monotonic())
        if line is not None:
            logger.info("%s", line)
        build = super().build
        return sparse_step(
            common_attn_metadata,
            split,
            self.kv_cache_spec.block_size,
            lambda rest: build(0, rest),
            lambda: self._build_dense(common_attn_metadata),
        )

    def _build_dense(self, common_attn_metadata: Any) -> Any:
        if self._dense_builder is None:
            self._dense_builder = self._make_parent()
        return self._dense_builder.build(0, common_attn_metadata)


def _group_problem(kv_cache_spec: Any, vllm_config: Any) -> str | None:
    """Why no layer of a group can run sparse, or None."""
    parallel = vllm_config.parallel_config
    # Exactly: subclasses, and the builders that vLLM derives for them, rearrange the requests of a step.
    if type(kv_cache_spec) is not FullAttentionSpec or kv_cache_spec.attention_chunk_size is not None:
        return f"the KV cache is a {type(kv_cache_spec).__name__} with rules of its own"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism spreads the keys of a request"
    if parallel.use_ubatching:
        return "micro-batches split the chunks"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "kv_sharing_fast_prefill leaves out queries"
    return None


class SparsePrefillImpl(AttentionImpl):
    """The parent's layer, which attends sparsely in a `SparseStep`.

    Attributes:
        sparse_counter: what its sparse chunks kept; None for a layer that the parent serves alone.
        attend: what runs for a chunk, `attend_chunk`; benchmarks put something else here.
    """

    key_value_dim: int

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
        super().__init__(
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
        self._settings: Settings = read_settings(config.additional_config)
        self._max_keys: int = config.model_config.max_model_len
        self.attend = attend_chunk
        reason = layer_problem(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap, extra=extra
        )
        if reason is not None:
            _say(f"sparse prefill: layers with {reason} are served by the parent backend alone")
        self.sparse_counter = DensityCounter() if reason is None else None
        # One layer of each shape compiles for all: they share the compiled code.
        shape = (num_heads, num_kv_heads, head_size, scale)
        self._warms_up = reason is None and not any(
            getattr(getattr(layer, "impl", None), "sparse_shape", None) == shape
            for layer in config.compilation_config.static_forward_context.values()
        )
        self.sparse_shape = shape if reason is None else None

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
        if attn_metadata is None and self._warms_up:  # vLLM measures what a step needs: compile, and count our memory
            self._warms_up = False
            start = time.monotonic()
            chunks = warm_up(query, self.num_kv_heads, self._max_keys, self._settings, self.scale)
            logger.info("sparse prefill: compiled and ran %d chunks in %.1f s", chunks, time.monotonic() - start)
        if not isinstance(attn_metadata, SparseStep):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        counter = self.sparse_counter
        if counter is not None and self._attend_chunks(query, kv_cache, attn_metadata, output, counter):
            self._attend_rest(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        return super().forward(layer, query, key, value, kv_cache, attn_metadata.dense, output, *scales)

    def _attend_chunks(
        self, query: Tensor, kv_cache: Tensor, step: SparseStep, output: Tensor, counter: DensityCounter
    ) -> bool:
        """The sparse chunks of a step; False where that failed, and the parent has to serve the step.

        An exception here would end the engine with every request in it; so it is logged and counted instead.
        """
        try:
            for chunk, blocks in zip(step.chunks, step.blocks, strict=True):
                rows = slice(chunk.start, chunk.end)
                out, selection = attend_paged(
                    query[rows], kv_cache, self.key_value_dim, blocks, chunk.kv_len, self._settings, self.scale,
                    self.attend,
                )  # fmt: skip
                output[rows].copy_(out)
                counter.add(selection)
        except Exception:
            counter.failures += len(step.chunks)
            logger.exception(
                "sparse prefill failed for chunks of (queries, keys) %s; the parent backend serves them",
                [(chunk.q_len, chunk.kv_len) for chunk in step.chunks],
            )
            return False
        return True

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
        super().forward(layer, take(query, rows), take(key, rows), take(value, rows), kv_cache, step.rest, mine)
        if not isinstance(rows, slice):
            output.index_copy_(0, rows, mine)
