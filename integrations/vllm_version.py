"""What differs between versions of vLLM: the layout of a KV cache, what the classes must have, how a backend is named.

Everything else in the integration is the same for all of them. Importing this module imports no vLLM.

| vLLM         | one layer's cache                              | said by                            | names           |
|--------------|------------------------------------------------|------------------------------------|-----------------|
| 0.24, 0.25   | `[blocks, 2, block_size, Hkv, D]`              | the backend's `get_kv_cache_shape` | CUSTOM          |
| 0.26 to 0.28 | `[blocks, Hkv, block_size, 2 * D]`, keys first | the backend's `get_kv_cache_shape` | CUSTOM          |
| 0.29 to 0.31 | the same                                       | the spec, after `customize_spec`   | CUSTOM          |
| 0.32, 0.33   | the same                                       | the spec, after `customize_spec`   | FLEXPREFILL too |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine_version import look_up
from .vllm_log import logger
from .vllm_plan import KNOWN_FIELDS, NEEDED_FIELDS

BACKEND = "flexprefill_fa.integrations.vllm_chooser.SparsePrefillBackend"
"""What vLLM's names for the backend stand for."""
NAME = "FLEXPREFILL"
"""The backend's own name, where vLLM has `AttentionBackendEnum.register`."""
KNOWN = (0, 24), (0, 33)
"""(major, minor) of the oldest and newest vLLM whose files the integration was written from."""


@dataclass(frozen=True)
class CacheLayout:
    """Where one layer's KV cache has its keys and values.

    Args:
        dim: the dimension that tells keys from values: 0 for `[2, blocks, block_size, Hkv, D]`, 1 for
            `[blocks, 2, block_size, Hkv, D]`. None where they lie side by side: `[blocks, Hkv, block_size, 2 * D]`.
    """

    dim: int | None

    def split(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each a view `[blocks, block_size, Hkv, D]`, whatever the strides of the cache."""
        if self.dim is None:
            key, value = cache.transpose(1, 2).unflatten(-1, (2, -1)).unbind(-2)
        else:
            key, value = cache.unbind(self.dim)
        return key, value


SIDE_BY_SIDE = CacheLayout(None)


def cache_layout(parent: Any, head_size: int, dtype: torch.dtype) -> CacheLayout | None:
    """The layout of a parent backend's cache without quantisation, None for one that is not read here.

    Args:
        parent: a class of vLLM's, with `get_kv_cache_shape` or, later, `customize_spec`.
        head_size: D.
        dtype: of the cache.
    """
    if hasattr(parent, "get_kv_cache_shape"):
        return _layout_of_shape(parent.get_kv_cache_shape, head_size)
    from vllm.v1.kv_cache_interface import FullAttentionSpec  # pyright: ignore[reportMissingImports]

    spec = FullAttentionSpec(block_size=64, num_kv_heads=5, head_size=head_size, dtype=dtype)
    return SIDE_BY_SIDE if spec_problem(parent.customize_spec(spec)) is None else None


def _layout_of_shape(get_kv_cache_shape: Callable[..., tuple[int, ...]], head_size: int) -> CacheLayout | None:
    blocks, block_size, heads = 1009, 64, 5
    try:
        shape = tuple(get_kv_cache_shape(blocks, block_size, heads, head_size))
    except (NotImplementedError, ValueError):
        return None
    page = block_size, heads, head_size
    layouts = {
        (2, blocks, *page): CacheLayout(0),
        (blocks, 2, *page): CacheLayout(1),
        (blocks, heads, block_size, 2 * head_size): SIDE_BY_SIDE,
    }
    return layouts.get(shape)


def spec_problem(spec: Any) -> str | None:
    """Why the cache of a layer cannot be read, or None; `spec` is its `FullAttentionSpec`.

    Since 0.28 a spec says how many head slots, states and bytes per state a block has; before, the backend's
    `get_kv_cache_shape` says all of it, and there is nothing to find here.
    """
    if not hasattr(spec, "state_content_size_bytes"):
        return None
    content = spec.state_content_size_bytes, 2 * spec.head_size * spec.dtype.itemsize
    states = getattr(spec, "num_states", spec.block_size)  # 0.28 has one for each token
    if content[0] != content[1] or spec.num_heads != spec.num_kv_heads or states != spec.block_size:
        return (
            f"a KV cache block is {spec.num_heads} heads of {states} times {content[0]} bytes, expected "
            f"{spec.num_kv_heads} of {spec.block_size} times {content[1]}"
        )
    return None


_MODULES = {
    "vllm.config": ("get_current_vllm_config", "get_layers_from_vllm_config"),
    "vllm.platforms": ("current_platform",),
    "vllm.utils.import_utils": ("resolve_obj_by_qualname",),
    "vllm.v1.attention.backend": (
        "AttentionBackend.get_name",
        "AttentionBackend.full_cls_name",
        "AttentionBackend.get_impl_cls",
        "AttentionBackend.get_builder_cls",
        "AttentionBackend.forward_includes_kv_cache_update",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE",
        "AttentionImpl",
        "AttentionMetadataBuilder",
        "AttentionType.DECODER",
        "CommonAttentionMetadata",
    ),
    "vllm.v1.attention.selector": ("AttentionSelectorConfig",),
    "vllm.v1.kv_cache_interface": ("FullAttentionSpec",),
}
_SIGNATURES = {
    "AttentionImpl": {
        "__init__": "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
        "logits_soft_cap attn_type kv_sharing_target_layer_name",
        "forward": "layer query key value kv_cache attn_metadata output output_scale output_block_scale",
    },
    "AttentionMetadataBuilder": {
        "__init__": "kv_cache_spec layer_names vllm_config device",
        "build": "common_prefix_len common_attn_metadata fast_build",
        "get_cudagraph_support": "vllm_config kv_cache_spec",
    },
}


def missing() -> list[str]:
    """What the installed vLLM lacks of what the integration needs, in words; empty where nothing is missing."""
    lacks, found = look_up(_MODULES, _SIGNATURES)
    backend, common = found.get("AttentionBackend"), found.get("CommonAttentionMetadata")
    if backend and not hasattr(backend, "get_kv_cache_shape") and not hasattr(backend, "customize_spec"):
        lacks.append("AttentionBackend.get_kv_cache_shape or AttentionBackend.customize_spec")
    return lacks + (_other_fields(common) if common else [])


def _other_fields(common: Any) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(common)}
    lacks = [f"CommonAttentionMetadata.{name}" for name in NEEDED_FIELDS if name not in fields]
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not optional and name not in KNOWN_FIELDS:
            lacks.append(f"a CommonAttentionMetadata that can do without {name}, which is not known here")
    return lacks


def version_problem(version: str) -> str | None:
    """Why this vLLM, the installed one, cannot be served, or None."""
    lacks = missing()
    if not lacks:
        return None
    needed = "; ".join(lacks)
    return f"the sparse prefill backend was written for {_known()}; vLLM {version} lacks what it needs: {needed}"


def version_warning(version: str) -> str | None:
    """What to say of a version that was not looked at before, or None; it is tried all the same."""
    parts = version.split(".")
    numbers = tuple(int(part) for part in parts[:2] if part.isdecimal())
    if len(numbers) == 2 and KNOWN[0] <= numbers <= KNOWN[1]:
        return None
    return f"sparse prefill was written for {_known()} and never tried with vLLM {version}; what it needs is there"


def _known() -> str:
    oldest, newest = (".".join(map(str, version)) for version in KNOWN)
    return f"vLLM {oldest} to {newest}"


def backend_member() -> Any:
    """vLLM's member FLEXPREFILL of `AttentionBackendEnum`, registered first where it is not there yet.

    An engine's configuration holds the member and goes to other processes. Those that are spawned read it before they
    load plug-ins, and vLLM's members are read by what is registered by then; so this one is read by a call of this
    function.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum  # pyright: ignore[reportMissingImports]

    member = AttentionBackendEnum.__members__.get(NAME)
    if member is None:
        member = AttentionBackendEnum.register(NAME, BACKEND)
        member.__reduce_ex__ = lambda protocol: (backend_member, ())
    return member


def register_names(version: str) -> list[str]:
    """Make the backend known to vLLM; the names by which it can be asked for, the best first.

    Args:
        version: vLLM's, for the log.
    """
    try:
        from vllm.v1.attention.backends.registry import (  # pyright: ignore[reportMissingImports]
            AttentionBackendEnum,
            register_backend,
        )
    except ImportError as error:
        logger.warning("vLLM %s has no registry of attention backends (%s): sparse prefill is off", version, error)
        return []
    names = []
    if hasattr(AttentionBackendEnum, "register") and _is_ours(backend_member()):
        names.append(NAME)
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        register_backend(custom, BACKEND)
    if (names and custom.get_path() == BACKEND) or (not names and _is_ours(custom)):
        names.append(custom.name)
    return names


def _is_ours(member: Any) -> bool:
    if member.get_path() == BACKEND:
        return True
    logger.warning(
        "the attention backend %s is taken by %s, so it is not sparse prefill; VLLM_PLUGINS chooses which plug-ins "
        "vLLM loads",
        member.name,
        member.get_path(),
    )
    return False
