"""What the integration needs of SGLang, and whether the installed one has it. Imports no SGLang until asked."""

from __future__ import annotations

import dataclasses

from .engine_version import look_up
from .sglang_plan import NEEDED_FIELDS

KNOWN = "0.5.23"
"""The version of SGLang whose files the integration was written from."""

STATE = "sglang.srt.managers.scheduler_components.internal_state"
REPORT = "SchedulerInternalStateController.get_internal_state"
"""What answers `/server_info`, in the module STATE."""

_MODULES = {
    "sglang.srt.layers.attention.attention_registry": ("ATTENTION_BACKENDS",),
    "sglang.srt.layers.attention.base_attn_backend": (
        "AttentionBackend",
        "AttentionBackend.init_forward_metadata_out_graph",
        "AttentionBackend.kv_index_translator",
    ),
    "sglang.srt.layers.radix_attention": ("AttentionType.DECODER", "RadixAttention"),
    "sglang.srt.mem_cache.memory_pool": (
        "KVWriteLoc.for_layer",
        "MHATokenToKVPool.get_key_buffer",
        "MHATokenToKVPool.get_value_buffer",
    ),
    "sglang.srt.model_executor.forward_batch_info": ("ForwardBatch", "ForwardMode.EXTEND", "ForwardMode.MIXED"),
    "sglang.srt.plugins.hook_registry": ("HookRegistry.apply_hooks", "HookType.AFTER"),
    "sglang.srt.runtime_context": (
        "attention_backends",
        "get_disagg",
        "get_exec",
        "get_model",
        "get_parallel",
        "get_schedule",
        "get_spec",
    ),
    "sglang.srt.utils.common": ("DynamicGradMode",),
    STATE: (REPORT,),
}
_SIGNATURES = {
    "AttentionBackend": {
        "init_forward_metadata": "forward_batch",
        "forward_extend": "q k v layer forward_batch save_kv_cache",
        "forward_decode": "q k v layer forward_batch save_kv_cache",
    },
    "MHATokenToKVPool": {"set_kv_buffer": "layer loc_info cache_k cache_v k_scale v_scale"},
}


def missing() -> list[str]:
    """What the installed SGLang lacks of what the integration needs, in words; empty where nothing is missing."""
    lacks, found = look_up(_MODULES, _SIGNATURES)
    batch = found.get("ForwardBatch")
    if batch is not None:
        fields = {field.name for field in dataclasses.fields(batch)}
        lacks += [f"ForwardBatch.{name}" for name in NEEDED_FIELDS if name not in fields]
    return lacks


def version_problem(version: str) -> str | None:
    """Why this SGLang, the installed one, cannot be served, or None."""
    lacks = missing()
    if not lacks:
        return None
    return (
        f"the sparse prefill backend was written for SGLang {KNOWN}; SGLang {version} lacks what it needs: "
        f"{'; '.join(lacks)}"
    )


def version_warning(version: str) -> str | None:
    """What to say of a version that was not looked at before, or None; it is tried all the same."""
    if version.split("+")[0].split(".post")[0] == KNOWN:
        return None
    return f"sparse prefill was written for SGLang {KNOWN} and never tried with {version}; what it needs is there"
