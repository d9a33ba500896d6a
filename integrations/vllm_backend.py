"""Which class a kind of layer gets: vLLM's own backend, with sparse prefill in front where it can run.

vLLM is asked which backend it would have been without ours, the *parent*; the answer is a subclass of that, or, for
layers that cannot run sparse, the parent itself. Only `vllm_chooser` imports this module.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.utils.import_utils import resolve_obj_by_qualname  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.selector import AttentionSelectorConfig  # pyright: ignore[reportMissingImports]

from .vllm_builder import SparsePrefillBuilder
from .vllm_config import engine_settings_of
from .vllm_impl import SparsePrefillImpl
from .vllm_log import log_once
from .vllm_plan import backend_problem, model_problem
from .vllm_version import CacheLayout, cache_layout, version_warning


def choose(asked: dict[str, Any], version: str) -> tuple[str, str]:
    """Module and name of the class for layers of a kind.

    Args:
        asked: vLLM's selection criteria.
        version: vLLM's.

    Raises:
        ValueError: for a GPU that is not CUDA's, a model that `model_problem` names, or a bad setting.
    """
    if not current_platform.is_cuda():
        raise ValueError(f"the sparse prefill backend is for CUDA GPUs, got {current_platform.device_name}")
    config = get_current_vllm_config()
    problem = model_problem(config)
    if problem is not None:
        raise ValueError(problem)
    warning = version_warning(version)
    if warning is not None:
        log_once(config, warning, logging.WARNING)
    engine_settings_of(config)  # a bad one is an error before any layer is made
    path = current_platform.get_attn_backend_cls(None, AttentionSelectorConfig(**asked), None)
    parent = resolve_obj_by_qualname(path)
    reason = backend_problem(**asked)
    if reason is None and parent.forward_includes_kv_cache_update:
        reason = f"a KV cache that {parent.get_name()} writes in its forward"
    if reason is None:
        layout = cache_layout(parent, asked["head_size"], asked["dtype"])
        if layout is not None:
            return backend_for(parent, layout).full_cls_name()
        reason = f"the KV cache layout of {parent.get_name()}"
    text = f"sparse prefill: layers with {reason} are served by {parent.get_name()} alone"
    log_once(config, text, logging.WARNING)
    return parent.full_cls_name()


@functools.cache
def backend_for(parent: Any, layout: CacheLayout) -> Any:
    """The parent's subclass with sparse prefill, under a name in this module by which vLLM finds it.

    It keeps the parent's name, on which vLLM's own code branches.
    """
    name = f"SparsePrefill{parent.__name__}"
    here = {"__module__": __name__}
    of_parent = {**here, "parent_name": parent.get_name()}
    impl_members = {**of_parent, "cache_layout": layout}
    impl: Any = type(f"{name}Impl", (SparsePrefillImpl, parent.get_impl_cls()), impl_members)
    builder_class = parent.get_builder_cls()
    builder_members = {**of_parent, "parent_class": builder_class}
    builder: Any = type(f"{name}Builder", (SparsePrefillBuilder, builder_class), builder_members)
    impl.own_class, builder.own_class = impl, builder
    methods = {"get_impl_cls": staticmethod(lambda: impl), "get_builder_cls": staticmethod(lambda: builder)}
    globals()[name] = backend = type(name, (parent,), {**here, **methods})
    return backend
