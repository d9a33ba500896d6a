"""What differs between the releases of vLLM that the tests stand in for, as their own files have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from paged import CommonAttentionMetadata
from torch import Tensor


class Backend:
    """`AttentionBackend`, as far as all releases have it."""

    forward_includes_kv_cache_update = True

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        return cls.__module__, cls.__qualname__

    @staticmethod
    def get_name() -> str:
        raise NotImplementedError

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type:
        raise NotImplementedError


class Backend24(Backend):
    @staticmethod
    def get_kv_cache_shape(blocks: int, size: int, heads: int, dim: int, cache_dtype_str: str = "auto") -> tuple:
        raise NotImplementedError


class Backend33(Backend):
    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return spec

    @classmethod
    def supported_kv_cache_layouts(cls) -> None:
        return None


class SelectorConfig24(NamedTuple):
    head_size: int
    dtype: torch.dtype
    kv_cache_dtype: str | None
    block_size: int | None
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    use_mm_prefix: bool = False
    use_per_head_quant_scales: bool = False
    attn_type: str = "decoder"
    use_non_causal: bool = False
    use_batch_invariant: bool = False
    use_kv_connector: bool = False


class SelectorConfig33(NamedTuple):
    head_size: int
    dtype: torch.dtype
    kv_cache_dtype: str | None
    block_size: int | None
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    use_mm_prefix: bool = False
    use_per_head_quant_scales: bool = False
    attn_type: str = "decoder"
    has_sliding_window: bool = False
    use_non_causal: bool = False
    use_batch_invariant: bool = False
    use_kv_connector: bool = False
    use_pcp: bool = False
    use_adaptive_verification: bool = False
    use_dcp: bool = False
    use_rswa: bool = False


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec24:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    attention_chunk_size: int | None = None
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec24(FullAttentionSpec24):
    pass


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec33(FullAttentionSpec24):
    head_size_v: int | None = None
    num_head_slots: int | None = None
    state_content_bytes: int | None = None
    tokens_per_state: int = 1
    non_causal: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads if self.num_head_slots is None else self.num_head_slots

    @property
    def num_states(self) -> int:
        return self.block_size // self.tokens_per_state

    @property
    def state_content_size_bytes(self) -> int:
        if self.state_content_bytes is not None:
            return self.state_content_bytes
        return (self.head_size + (self.head_size_v or self.head_size)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec33(FullAttentionSpec33):
    pass


@dataclass
class CommonAttentionMetadata33:
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    logits_indices_padded: Tensor | None = None
    num_logits_indices: int | None = None
    max_logits_per_req: int | None = None
    encoder_seq_lens: Tensor | None = None
    encoder_seq_lens_cpu: np.ndarray | None = None
    dcp_local_seq_lens: Tensor | None = None
    dcp_local_seq_lens_cpu_upper_bound: Tensor | None = None
    positions: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    req_idx: np.ndarray | None = None
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None
    rswa_prefix_lens: Tensor | None = None
    replayssm_decode_base_cpu: Tensor | None = None
    _num_computed_tokens_cache: Tensor | None = None
    _token_to_req_indices_cache: Tensor | None = None

    @classmethod
    def like(cls, common: CommonAttentionMetadata) -> CommonAttentionMetadata33:
        """The same step as the second model runner hands it over: with the requests' rows and caches filled."""
        old = {name: value for name, value in vars(common).items() if name in cls.__dataclass_fields__}
        requests = torch.arange(common.num_reqs)
        lengths = common.query_start_loc[1:] - common.query_start_loc[:-1]
        filled = {
            "req_idx": requests.numpy() + 40,
            "_num_computed_tokens_cache": common.seq_lens - lengths,
            "_token_to_req_indices_cache": requests.repeat_interleave(lengths).to(torch.int32),
        }
        return cls(**{**old, **filled})


@dataclass(frozen=True)
class Release:
    """One release.

    Args:
        kv_dim: of a layer's cache, as for `PagedBatch`.
        named: whether a backend can have a name of its own.
    """

    version: str
    kv_dim: int | None
    named: bool
    backend: type
    selector_config: type
    full_spec: Any
    sliding_spec: Any
    metadata: Any

    def common(self, common: CommonAttentionMetadata) -> Any:
        """A step's metadata as this release has it."""
        return common if self.metadata is CommonAttentionMetadata else self.metadata.like(common)


V24 = Release(
    "0.24.0",
    1,
    False,
    Backend24,
    SelectorConfig24,
    FullAttentionSpec24,
    SlidingWindowSpec24,
    CommonAttentionMetadata,
)
V33 = Release(
    "0.33.0",
    None,
    True,
    Backend33,
    SelectorConfig33,
    FullAttentionSpec33,
    SlidingWindowSpec33,
    CommonAttentionMetadata33,
)
RELEASES = {release.version: release for release in (V24, V33)}
