"""Stand-ins for the parts of vLLM that the backend touches; the parent backend is plain PyTorch and keeps a diary."""

from __future__ import annotations

import enum
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from paged import paged_attention
from stand_in_modules import PACKAGE, stand_in_modules
from vllm_releases import V24, V33, Backend24, Backend33, Release


class CGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class Builder:
    _cudagraph_support = CGSupport.NEVER
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        self.kv_cache_spec = kv_cache_spec

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> CGSupport:
        return cls._cudagraph_support

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        raise NotImplementedError


class Impl:
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="auto", logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> Any:
        raise NotImplementedError


@dataclass
class ParentMetadata:
    common: Any
    builder: Any
    common_prefix_len: int
    fast_build: bool


class ParentBuilder(Builder):
    _cudagraph_support = CGSupport.ALWAYS

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> ParentMetadata:
        return ParentMetadata(common_attn_metadata, self, common_prefix_len, fast_build)

    def use_cascade_attention(self, common_prefix_len: int, query_lens: Any, **kwargs: Any) -> bool:
        return common_prefix_len > 0


class ParentImpl(Impl):
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="auto", logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None, **extra,
    ) -> None:  # fmt: skip
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, num_kv_heads, head_size, scale
        self.calls: list[Any] = []

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return True

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        self.calls.append((attn_metadata, query))
        if attn_metadata is None:
            return output.fill_(0)
        common = attn_metadata.common
        rows = common.num_actual_tokens
        output[:rows] = paged_attention(query[:rows], kv_cache, common, kv_cache.shape[2], installed().kv_dim).to(
            output.dtype
        )
        return output


class Parent:
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "PARENT"

    @staticmethod
    def get_impl_cls() -> type:
        return ParentImpl

    @staticmethod
    def get_builder_cls() -> type:
        return ParentBuilder


class ParentBackend24(Parent, Backend24):
    @staticmethod
    def get_kv_cache_shape(blocks: int, size: int, heads: int, dim: int, cache_dtype_str: str = "auto") -> tuple:
        return blocks, 2, size, heads, dim


class ParentBackend33(Parent, Backend33):
    pass


PARENTS = {V24.version: ParentBackend24, V33.version: ParentBackend33}


def installed() -> Release:
    """The release that is in place."""
    return sys.modules["vllm"].release  # pyright: ignore[reportAttributeAccessIssue]


class Layer(torch.nn.Module):
    def __init__(self, impl: Any) -> None:
        super().__init__()
        self.impl = impl


class EngineConfig(types.SimpleNamespace):
    """As vLLM's: it has no hash, but can be referred to weakly."""


def engine_config(**sparse_prefill: Any) -> Any:
    """What the backend reads of a VllmConfig."""
    return EngineConfig(
        additional_config={"sparse_prefill": sparse_prefill} if sparse_prefill else {},
        model_config=types.SimpleNamespace(
            max_model_len=4096, dtype=torch.bfloat16, hf_text_config=types.SimpleNamespace(head_dim=32)
        ),
        diffusion_config=None,
        scheduler_config=types.SimpleNamespace(
            max_num_batched_tokens=1024,
            max_num_scheduled_tokens=None,
            max_num_seqs=16,
            long_prefill_token_threshold=0,
        ),
        parallel_config=types.SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        cache_config=types.SimpleNamespace(kv_sharing_fast_prefill=False, block_size=16),
        compilation_config=types.SimpleNamespace(static_forward_context={}),
    )


@dataclass
class FakeVllm:
    """The stand-ins in place: `module` is the backend's, imported over them; `of` gives the others."""

    release: Release
    module: Any = None
    config: Any = None
    cuda: bool = True
    parent: Any = None
    asked: list[Any] = field(default_factory=list)
    registered: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Any:
        """A module of the integration, imported over the stand-ins."""
        return importlib.import_module(f"{PACKAGE}.{name}")

    def choose(self, config: Any, **changes: Any) -> Any:
        """What vLLM's platform does for a layer with CUSTOM selected: validate, ask for the name, look it up."""
        self.config = config
        asked = self.release.selector_config(32, torch.bfloat16, "auto", None)._replace(**changes)._asdict()
        chooser = self.of("vllm_chooser").SparsePrefillBackend
        assert chooser.validate_configuration(device_capability=(9, 0), **asked) == []
        module, name = chooser.full_cls_name()
        return getattr(sys.modules[module], name)

    def layer(self, backend: Any, config: Any, name: str, **extra: Any) -> Layer:
        """An attention layer of a model, as vLLM makes it."""
        self.config = config
        arguments = [4, 32, 32**-0.5, 2, extra.pop("alibi_slopes", None), extra.pop("sliding_window", None), "auto"]
        arguments += [extra.pop("logits_soft_cap", None), "decoder", None]
        layer = Layer(backend.get_impl_cls()(*arguments, **extra))
        config.compilation_config.static_forward_context[name] = layer
        return layer

    def builder(self, backend: Any, config: Any, names: list[str], spec: Any = None) -> Any:
        return backend.get_builder_cls()(spec or self.spec(), names, config, torch.device("cpu"))

    def spec(self, block_size: int = 16, sliding: bool = False, **changes: Any) -> Any:
        """Of the cache that `batch_of` has."""
        kind = self.release.sliding_spec if sliding else self.release.full_spec
        return kind(**{"block_size": block_size, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, **changes})


_MODULES = ("vllm_backend", "vllm_builder", "vllm_chooser", "vllm_impl")


@contextmanager
def fake_vllm(release: Release = V24, parent: str | None = None) -> Iterator[FakeVllm]:
    """vLLM replaced by stand-ins for as long as the context lasts; `parent` names another release's."""
    fake = FakeVllm(release, parent=PARENTS[parent or release.version])

    def find_parent(selected: Any, config: Any, heads: Any) -> str:
        assert selected is None, "the parent is what vLLM chooses without CUSTOM"
        fake.asked.append(config)
        return f"{fake.parent.__module__}.{fake.parent.__qualname__}"

    platform = types.SimpleNamespace(
        is_cuda=lambda: fake.cuda, device_name="cuda" if fake.cuda else "cpu", get_attn_backend_cls=find_parent
    )

    class Enumeration(enum.Enum):
        CUSTOM = None

        def is_overridden(self) -> bool:
            return self.name in fake.registered

        def get_path(self) -> str:
            path = fake.registered.get(self.name, self.value)
            if not path:
                raise ValueError(f"Backend {self.name} must be registered before use")
            return path

    def register(kind: Any, name: str, value: str) -> Any:
        if name in kind._member_map_:
            raise ValueError(f"Backend {name} already exists")
        member = object.__new__(kind)
        member._name_, member._value_ = name, value
        kind._member_map_[name] = kind._value2member_map_[value] = member
        return member

    if release.named:
        Enumeration.register = classmethod(register)  # pyright: ignore[reportAttributeAccessIssue]

    def layers_of(config: Any, kind: type, names: list[str]) -> dict[str, Any]:
        context = config.compilation_config.static_forward_context
        return {name: context[name] for name in names if isinstance(context[name], kind)}

    def resolve(path: str) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    contents: dict[str, dict[str, Any]] = {
        "vllm": {"release": release},
        "vllm.version": {"__version__": release.version},
        "vllm.config": {
            "get_current_vllm_config": lambda: fake.config,
            "get_layers_from_vllm_config": layers_of,
        },
        "vllm.platforms": {"current_platform": platform},
        "vllm.utils": {},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": resolve},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionBackend": release.backend,
            "AttentionCGSupport": CGSupport,
            "AttentionImpl": Impl,
            "AttentionMetadataBuilder": Builder,
            "AttentionType": types.SimpleNamespace(DECODER="decoder"),
            "CommonAttentionMetadata": release.metadata,
        },
        "vllm.v1.attention.selector": {"AttentionSelectorConfig": release.selector_config},
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Enumeration,
            "register_backend": lambda backend, path: fake.registered.update({backend.name: path}),
        },
        "vllm.v1.kv_cache_interface": {"FullAttentionSpec": release.full_spec},
        "vllm.compilation": {},
        "vllm.compilation.backends": {"model_tag": "backbone"},
    }
    with stand_in_modules(contents, _MODULES):
        fake.module = fake.of("vllm_backend")
        yield fake


def log_lines(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vllm.flexprefill_fa"]
