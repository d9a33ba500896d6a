"""What differs between versions of vLLM, over stand-ins: cache layouts, what is missing, the names of the backend."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from typing import Any

import pytest
import torch
from paged import MIXED, SMALL
from vllm_layers import batch_of, one_layer, run
from vllm_releases import V24, V33, CommonAttentionMetadata33, FullAttentionSpec33
from vllm_stubs import FakeVllm, Impl, ParentBuilder, ParentMetadata, engine_config, fake_vllm, log_lines

from flexprefill_fa.integrations.vllm import register
from flexprefill_fa.integrations.vllm_plan import SparseStep
from flexprefill_fa.integrations.vllm_version import (
    BACKEND,
    CacheLayout,
    backend_member,
    cache_layout,
    missing,
    register_names,
    spec_problem,
    version_problem,
    version_warning,
)


class Shaped:
    """A parent of before 0.29, whose cache has the shape that a function makes."""

    def __init__(self, shape: Any) -> None:
        self.get_kv_cache_shape = shape


def refuses(*shape: int) -> tuple[int, ...]:
    raise ValueError("another block size")


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (lambda blocks, *page: (blocks, 2, *page), CacheLayout(1)),
        (lambda *shape: (2, *shape), CacheLayout(0)),
        (lambda blocks, size, heads, dim: (blocks, heads, size, 2 * dim), CacheLayout(None)),
        (lambda blocks, size, heads, dim: (blocks, size, heads, 2 * dim), None),
        (lambda blocks, size, heads, dim: (blocks, size, dim), None),
        (refuses, None),
    ],
)
def test_layouts_that_a_shape_shows(shape: Any, layout: CacheLayout | None) -> None:
    assert cache_layout(Shaped(shape), 128, torch.bfloat16) == layout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"head_size_v": 16}, "2 heads of 16 times 96 bytes, expected 2 of 16 times 128"),
        ({"state_content_bytes": 72}, "times 72 bytes"),
        ({"num_head_slots": 4}, "4 heads of 16"),
        ({"tokens_per_state": 4}, "2 heads of 4"),
    ],
)
def test_layouts_that_a_spec_shows(change: dict[str, Any], words: str | None) -> None:
    spec = FullAttentionSpec33(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    problem = spec_problem(dataclasses.replace(spec, **change))
    assert problem is None if words is None else words in str(problem)


def test_a_group_whose_cache_is_another_stays_dense(caplog) -> None:
    """Though its backend's usual layout is one that can be read: the layer has values of another size."""
    with fake_vllm(V33) as vllm:
        config = engine_config(**SMALL)
        backend = vllm.choose(config)
        vllm.layer(backend, config, "layer.0")
        for change, words in [({"head_size_v": 16}, "192 bytes, expected"), ({"non_causal": True}, "is not causal")]:
            builder = vllm.builder(backend, config, ["layer.0"], vllm.spec(**change))
            assert isinstance(builder.build(0, batch_of(MIXED).common), ParentMetadata)
            assert words in log_lines(caplog)[-1] and "PARENT serves these layers alone" in log_lines(caplog)[-1]


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("0.24.0", False),
        ("0.24.1+cu130", False),
        ("0.28.0", False),
        ("0.33.0rc1", False),
        ("0.34.0", True),
        ("0.34.0.dev12+g0abcdef", True),
        ("1.0.0", True),
        ("0.23.0", True),
        ("dev", True),
    ],
)
def test_unknown_versions_are_warned_of(version: str, warned: bool) -> None:
    warning = version_warning(version)
    assert (warning is not None) == warned
    assert not warned or f"written for vLLM 0.24 to 0.33 and never tried with vLLM {version}" in str(warning)


def test_an_unknown_version_is_tried_with_one_warning(caplog) -> None:
    with fake_vllm(dataclasses.replace(V33, version="0.40.0"), parent=V33.version) as vllm:
        layer, builder = one_layer(vllm)
        vllm.choose(vllm.config)
        assert [line for line in log_lines(caplog) if "never tried with vLLM 0.40.0" in line] == log_lines(caplog)
        assert len(log_lines(caplog)) == 1
        batch = batch_of(MIXED)
        metadata = builder.build(0, batch.common)
        assert isinstance(metadata, SparseStep)
        out = run(layer, metadata, batch)
        assert not torch.allclose(out[1:261].double(), batch.dense()[1:261], atol=0.01), "sparse turned dense"


def test_nothing_is_missing(vllm: FakeVllm) -> None:
    assert missing() == [] and version_problem(vllm.release.version) is None


def _other_forward(self: Any, layer: Any, query: Any, key: Any, value: Any, attn_metadata: Any, output: Any) -> None:
    pass


_Blocks = dataclasses.make_dataclass(
    "CommonAttentionMetadata",
    [
        ("shards", Any),
        *[
            (field.name, Any)
            for field in dataclasses.fields(CommonAttentionMetadata33)
            if field.name != "slot_mapping" and not field.name.startswith("_")
        ],
    ],
)


@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        ("vllm.v1.kv_cache_interface", None, None, r"the module vllm\.v1\.kv_cache_interface \(.*"),
        ("vllm.v1.kv_cache_interface", "FullAttentionSpec", None, r"vllm\.v1\.kv_cache_interface\.FullAttentionSpec"),
        ("vllm.config", "get_layers_from_vllm_config", None, r"vllm\.config\.get_layers_from_vllm_config"),
        ("vllm.v1.attention.backend", "AttentionCGSupport", object, r"AttentionCGSupport\.UNIFORM_SINGLE_TOKEN_DECODE"),
        (
            "vllm.v1.attention.backend",
            "AttentionImpl",
            type("AttentionImpl", (Impl,), {"forward": _other_forward}),
            r"AttentionImpl\.forward\(layer, query, key, value, kv_cache, .*\), got \(layer, query, key, value, attn",
        ),
        (
            "vllm.v1.attention.backend",
            "CommonAttentionMetadata",
            _Blocks,
            r"CommonAttentionMetadata\.slot_mapping; a CommonAttentionMetadata that can do without shards",
        ),
    ],
)
def test_a_version_that_lacks_something_is_refused_by_name(
    vllm: FakeVllm, monkeypatch, module: str, name: str | None, value: Any, words: str
) -> None:
    """When its engine starts. vLLM hides the text of an ImportError; so there is none, whichever version moved what."""
    if name is None:
        monkeypatch.setitem(sys.modules, module, None)
    elif value is None:
        monkeypatch.delattr(sys.modules[module], name)
    else:
        monkeypatch.setattr(sys.modules[module], name, value)
    version = vllm.release.version
    with pytest.raises(ValueError, match=rf"vLLM 0\.24 to 0\.33; vLLM {version} lacks what it needs: .*{words}"):
        vllm.choose(engine_config(**SMALL))


def test_a_backend_without_any_layout_is_named(vllm: FakeVllm, monkeypatch) -> None:
    for name in ("get_kv_cache_shape", "customize_spec"):
        if hasattr(vllm.release.backend, name):
            monkeypatch.delattr(vllm.release.backend, name)
    assert missing() == ["AttentionBackend.get_kv_cache_shape or AttentionBackend.customize_spec"]


def test_registering(vllm: FakeVllm, caplog) -> None:
    for _ in range(2):  # vLLM may load plug-ins more than once
        register()
        registry = sys.modules["vllm.v1.attention.backends.registry"].AttentionBackendEnum
        names = ["FLEXPREFILL", "CUSTOM"] if vllm.release.named else ["CUSTOM"]
        assert [name for name, member in registry.__members__.items() if member.get_path() == BACKEND] == names[::-1]
        assert register_names("0") == names
    assert log_lines(caplog) == []


def test_a_name_that_somebody_else_has(vllm: FakeVllm, caplog) -> None:
    """CUSTOM is missed only where it is the only name."""
    vllm.registered["CUSTOM"] = "somebody.Else"
    assert register_names("0") == (["FLEXPREFILL"] if vllm.release.named else [])
    assert vllm.registered["CUSTOM"] == "somebody.Else"
    taken = "the attention backend CUSTOM is taken by somebody.Else"
    assert [line.partition(", so")[0] for line in log_lines(caplog)] == ([] if vllm.release.named else [taken])


def test_our_name_that_somebody_else_has(caplog) -> None:
    with fake_vllm(V33):
        sys.modules["vllm.v1.attention.backends.registry"].AttentionBackendEnum.register("FLEXPREFILL", "somebody.Else")
        assert register_names("0") == ["CUSTOM"]
        assert "the attention backend FLEXPREFILL is taken by somebody.Else" in log_lines(caplog)[-1]


def test_a_vllm_without_a_registry(vllm: FakeVllm, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    register()
    assert f"vLLM {vllm.release.version} has no registry of attention backends" in log_lines(caplog)[-1]


def test_a_member_is_read_where_no_plugin_was_loaded() -> None:
    """A spawned engine reads its configuration first."""
    with fake_vllm(V33):
        text = pickle.dumps(backend_member())
        assert pickle.loads(text) is backend_member()
    with fake_vllm(V33):  # as another process: nothing is registered
        registry = sys.modules["vllm.v1.attention.backends.registry"].AttentionBackendEnum
        assert "FLEXPREFILL" not in registry.__members__
        member = pickle.loads(text)
        assert member is registry["FLEXPREFILL"] and member.get_path() == BACKEND


def test_parents_that_take_more(vllm: FakeVllm) -> None:
    """0.29 and later may hand a builder the width of the block table, and a model more for a step."""
    seen = []

    class Wide(ParentBuilder):
        def __init__(self, *arguments: Any, block_table_width: int) -> None:
            super().__init__(*arguments)
            seen.append(block_table_width)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **extra: Any):
            seen.append(extra)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    class WideBackend(vllm.parent):
        get_builder_cls = staticmethod(lambda: Wide)

    config = engine_config(**SMALL)
    vllm.config = config
    backend = vllm.module.backend_for(WideBackend, CacheLayout(vllm.release.kv_dim))
    vllm.layer(backend, config, "layer.0")
    arguments = (vllm.spec(), ["layer.0"], config, torch.device("cpu"))
    builder = backend.get_builder_cls()(*arguments, block_table_width=7)
    assert seen == [7, 7], "the second builder gets it too"
    assert isinstance(builder.build(0, batch_of(MIXED).common), SparseStep)
    assert isinstance(builder.build(0, batch_of(MIXED).common, windows=3), ParentMetadata)
    assert seen[2:] == [{}, {"windows": 3}]


def test_steps_that_stay_whole_are_named_once(vllm: FakeVllm, caplog) -> None:
    layer, builder = one_layer(vllm)
    common = dataclasses.replace(batch_of(MIXED).common, mm_req_doc_ranges={1: [(0, 5)]})
    for _ in range(2):
        assert isinstance(builder.build(0, common), ParentMetadata)
    assert log_lines(caplog) == ["sparse prefill: steps with the field mm_req_doc_ranges are served by PARENT alone"]
    assert layer.impl.sparse_counter.read()["declined"] == 4


def test_both_releases_give_the_same_rows() -> None:
    """One step, two layouts and two kinds of metadata."""
    rows = []
    for release in (V24, V33):
        with fake_vllm(release) as vllm:
            layer, builder = one_layer(vllm)
            batch = batch_of(MIXED)
            rows.append(run(layer, builder.build(0, batch.common), batch))
            assert layer.impl.sparse_counter.read()["chunks"] == 2
    assert torch.equal(*rows)
