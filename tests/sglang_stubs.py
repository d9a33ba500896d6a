"""Stand-ins for the parts of SGLang 0.5.23 that the integration touches, with its names and fields."""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class AttentionType(enum.Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class RadixAttention(torch.nn.Module):
    """The fields of SGLang's layer; `forward` there ends in the backend's."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        logit_cap: float = 0.0,
        v_head_dim: int = -1,
        sliding_window_size: int = -1,
        is_cross_attention: bool = False,
        pos_encoding_mode: str = "NONE",
        attn_type: AttentionType = AttentionType.DECODER,
        use_irope: bool = False,
    ) -> None:
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.tp_v_head_num = num_heads, num_kv_heads, num_kv_heads
        self.head_dim = self.qk_head_dim = head_dim
        self.v_head_dim = v_head_dim if v_head_dim != -1 else head_dim
        self.scaling, self.layer_id, self.logit_cap = scaling, layer_id, logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention, self.use_irope, self.attn_type = is_cross_attention, use_irope, attn_type
        self.pos_encoding_mode, self.xai_temperature_len = pos_encoding_mode, -1
        self.k_scale = self.v_scale = None


class ForwardMode(enum.IntEnum):
    EXTEND = 1
    DECODE = 2
    MIXED = 3
    IDLE = 4
    TARGET_VERIFY = 5
    DRAFT_EXTEND_V2 = 6


@dataclass
class ForwardBatch:
    """Those of SGLang's fields that the integration reads or replaces."""

    forward_mode: ForwardMode
    batch_size: int
    input_ids: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    out_cache_loc: Tensor
    seq_lens_sum: int
    orig_seq_lens: Tensor | None = None
    kv_loc_plan: Any = None
    kv_loc_cols: Any = None
    out_cache_loc_virtual: Tensor | None = None
    out_cache_loc_is_physical: bool = False
    encoder_lens: Tensor | None = None
    seq_lens_cpu: Tensor | None = None
    req_pool_indices_cpu: Tensor | None = None
    mm_inputs: list[Any] | None = None
    multi_item_delimiter_indices: list[Tensor] | None = None
    spec_info: Any = None
    positions: Tensor | None = None
    extend_num_tokens: int | None = None
    extend_seq_lens: Tensor | None = None
    extend_prefix_lens: Tensor | None = None
    extend_start_loc: Tensor | None = None
    extend_prefix_lens_cpu: list[int] | None = None
    extend_seq_lens_cpu: list[int] | None = None
    extend_logprob_start_lens_cpu: list[int] | None = None
    global_num_token_non_padded_cpu: int | None = None
    _attn_output: Tensor | None = None
    cross_attention_custom_mask: Tensor | None = None
    tbo_children: list[Any] | None = None
    attn_cp_metadata: Any = None
    attn_dcp_metadata: Any = None
    encoder_swa_row_floor: Tensor | None = None
    mha_return_lse: bool | None = None


@dataclass
class KVWriteLoc:
    loc: Tensor

    @classmethod
    def for_layer(cls, forward_batch: Any, layer: Any) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc)


class MHATokenToKVPool:
    """One buffer of keys and one of values for each layer, `[slots, Hkv, D]`; slot 0 is padding."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        layer_num: int,
        device: str,
        enable_memory_saver: bool,
    ) -> None:
        self.dtype, self.kv_cache_layout = dtype, "nhd"
        shape = (layer_num, size + page_size, head_num, head_dim)
        self.k_buffer, self.v_buffer = (list(torch.zeros(shape, dtype=dtype)) for _ in range(2))

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k_buffer[layer_id]

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.v_buffer[layer_id]

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: KVWriteLoc,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> None:
        self.k_buffer[layer.layer_id][loc_info.loc] = cache_k
        self.v_buffer[layer.layer_id][loc_info.loc] = cache_v


class ReqToTokenPool:
    def __init__(self, size: int, max_context_len: int, device: str, enable_memory_saver: bool) -> None:
        self.req_to_token = torch.zeros(size + 1, max_context_len, dtype=torch.int32)


class AttentionBackend:
    """What of SGLang's base class reaches a backend."""

    forward_metadata: Any = None
    kv_index_translator: Any = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.init_forward_metadata_out_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        pass

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Any:
        if forward_batch.forward_mode == ForwardMode.DECODE:
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
        raise NotImplementedError

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
        raise NotImplementedError


class HookType(enum.Enum):
    AFTER = "after"


class HookRegistry:
    """As SGLang's: a target is patched once, by the hooks that are known by then."""

    hooks: ClassVar[dict[str, list[Any]]] = {}
    patched: ClassVar[set[str]] = set()

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType) -> None:
        cls.hooks.setdefault(target, []).append(hook)

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hooks in cls.hooks.items():
            module, owner, name = target.rsplit(".", 2)
            if target not in cls.patched:
                kind = getattr(sys.modules[module], owner)
                setattr(kind, name, _after(getattr(kind, name), hooks))
                cls.patched.add(target)


def _after(original: Any, hooks: list[Any]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for hook in hooks:
            modified = hook(result, *args, **kwargs)
            result = result if modified is None else modified
        return result

    return wrapped


GETTERS = ("attention_backends", "get_disagg", "get_exec", "get_model", "get_parallel", "get_schedule", "get_spec")
"""Functions of SGLang's `runtime_context` that the integration calls."""


def contents() -> dict[str, dict[str, Any]]:
    """The modules, by name, made anew: registries are empty."""
    backends: dict[str, Any] = {}
    choices = ["triton", "fa3"]

    def register_attention_backend(name: str) -> Any:
        return lambda create: backends.update({name: create}) or create

    class SchedulerInternalStateController:
        def get_internal_state(self, recv_req: Any) -> Any:
            return types.SimpleNamespace(internal_state={"world_size": 1})

    registry = type("HookRegistry", (HookRegistry,), {"hooks": {}, "patched": set()})
    srt = "sglang.srt"
    packages = ["sglang", "sglang.srt", "sglang.srt.arg_groups", "sglang.srt.layers", "sglang.srt.layers.attention"]
    packages += ["sglang.srt.mem_cache", "sglang.srt.model_executor", "sglang.srt.plugins", "sglang.srt.managers"]
    packages += ["sglang.srt.managers.scheduler_components", "sglang.srt.utils"]
    return {
        **{name: {} for name in packages},
        "sglang.version": {"__version__": "0.5.23"},
        f"{srt}.arg_groups.choices": {
            "ATTENTION_BACKEND_CHOICES": choices,
            "add_attention_backend_choices": choices.extend,
        },
        f"{srt}.layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": register_attention_backend,
        },
        f"{srt}.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
        f"{srt}.layers.radix_attention": {"AttentionType": AttentionType, "RadixAttention": RadixAttention},
        f"{srt}.managers.scheduler_components.internal_state": {
            "SchedulerInternalStateController": SchedulerInternalStateController
        },
        f"{srt}.mem_cache.memory_pool": {
            "KVWriteLoc": KVWriteLoc,
            "MHATokenToKVPool": MHATokenToKVPool,
            "ReqToTokenPool": ReqToTokenPool,
        },
        f"{srt}.model_executor.forward_batch_info": {"ForwardBatch": ForwardBatch, "ForwardMode": ForwardMode},
        f"{srt}.plugins.hook_registry": {"HookRegistry": registry, "HookType": HookType},
        f"{srt}.utils.common": {"DynamicGradMode": torch.no_grad},
        f"{srt}.runtime_context": dict.fromkeys(GETTERS, print),  # tests put their own in our modules
    }
