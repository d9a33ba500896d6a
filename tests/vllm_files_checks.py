"""The integration over a release's own files: `python vllm_files_checks.py FOLDER`, in a process of its own.

Real are all of vLLM's Python classes that the integration touches: the registry, the selection criteria, the metadata,
the specs, FlashAttention's backend, builder and layer, and what the second model runner makes of a step. Replaced are
what is compiled or not installed (by placeholders), the platform and the configuration (there is no GPU), and
FlashAttention's kernel (by plain attention).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paged import MIXED, SMALL, PagedBatch, paged_attention
from vllm_files import put_in_place
from vllm_stubs import engine_config

from flexprefill_fa.integrations import vllm_version

READ_MEMBER = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).get_path())"
SIDE_BY_SIDE_SINCE = (0, 26)
NAMES_SINCE = (0, 32)


def registering(folder: Path, version: tuple[int, ...]) -> None:
    """Vllm finds the backend by each name; a member in a configuration can be read by a process without plug-ins."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum  # pyright: ignore[reportMissingImports]

    names = vllm_version.register_names("this one")
    assert names == (["FLEXPREFILL", "CUSTOM"] if version >= NAMES_SINCE else ["CUSTOM"])
    assert vllm_version.register_names("this one") == names, "vLLM may load plug-ins more than once"
    for name in names:
        assert AttentionBackendEnum[name].get_class().__name__ == "SparsePrefillBackend"
    if "FLEXPREFILL" in names:
        from vllm.config.attention import AttentionConfig  # pyright: ignore[reportMissingImports]

        config = AttentionConfig(backend="flexprefill")
        assert config.backend is AttentionBackendEnum["FLEXPREFILL"]
        assert copy.deepcopy(config).backend is pickle.loads(pickle.dumps(config)).backend is config.backend
        assert config.compute_hash() != AttentionConfig(backend="custom").compute_hash()
        child = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
            f"import vllm_files; vllm_files.put_in_place(Path({str(folder)!r})); {READ_MEMBER}"
        )
        command = [sys.executable, "-c", child, pickle.dumps(config.backend).hex()]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1:] == [vllm_version.BACKEND], done.stderr


def layouts(version: tuple[int, ...]) -> None:
    """Keys and values are taken from a cache as FlashAttention's own forward takes them."""
    from vllm.v1.attention.backends import (  # pyright: ignore[reportMissingImports]
        flash_attn,
        flex_attention,
        triton_attn,
    )

    layout = vllm_version.cache_layout(flash_attn.FlashAttentionBackend, 128, torch.bfloat16)
    assert layout is not None and layout == vllm_version.CacheLayout(None if version >= SIDE_BY_SIDE_SINCE else 1)
    for parent in (triton_attn.TritonAttentionBackend, flex_attention.FlexAttentionBackend):
        assert vllm_version.cache_layout(parent, 128, torch.bfloat16) == layout
    source = inspect.getsource(flash_attn.FlashAttentionImpl.forward)
    found = re.search(r"key_cache, value_cache = (kv_cache\..*)", source)
    assert found is not None
    batch = PagedBatch([(3, 40)], head_dim=32, kv_heads=2, kv_dim=layout.dim)
    theirs = eval(found[1], {"kv_cache": batch.cache, "self": types.SimpleNamespace(head_size=32)})
    for mine, other in zip(layout.split(batch.cache), theirs, strict=True):
        assert mine.shape == other.shape and mine.stride() == other.stride() and mine.data_ptr() == other.data_ptr()


def quantised_caches() -> None:
    """A spec that a backend packs in its own way is seen."""
    from vllm.v1.attention.backends import triton_attn  # pyright: ignore[reportMissingImports]
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode  # pyright: ignore[reportMissingImports]

    plain = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    assert vllm_version.spec_problem(plain) is None
    if hasattr(triton_attn.TritonAttentionBackend, "customize_spec"):
        quantised = dataclasses.replace(plain, dtype=torch.uint8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)
        problem = vllm_version.spec_problem(triton_attn.TritonAttentionBackend.customize_spec(quantised))
        assert problem is not None and "72 bytes, expected 2 of 16 times 64" in problem
        assert vllm_version.spec_problem(dataclasses.replace(plain, head_size_v=16)) is not None


def metadata_of(batch: PagedBatch) -> Any:
    """The step in the release's own class, with every field that a runner fills for plain decoders."""
    from vllm.v1.attention.backend import CommonAttentionMetadata  # pyright: ignore[reportMissingImports]

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    common = batch.common
    lengths = common.query_start_loc[1:] - common.query_start_loc[:-1]
    requests = torch.arange(common.num_reqs)
    filled = {
        **vars(common),
        "req_idx": requests.numpy() + 40,
        "_num_computed_tokens_cache": common.seq_lens - lengths,
        "_token_to_req_indices_cache": requests.repeat_interleave(lengths).to(torch.int32),
    }
    return CommonAttentionMetadata(**{name: value for name, value in filled.items() if name in names})


def a_part_of_a_step() -> None:
    """`restrict` on the real class: dense attention by the part alone is that of the whole."""
    from flexprefill_fa.integrations.engine_plan import take
    from flexprefill_fa.integrations.vllm_plan import restrict

    batch = PagedBatch([(1, 30), (40, 60), (3, 5), (1, 9)])
    for kept in ([0, 1], [0, 2, 3], [1]):
        common = metadata_of(batch)
        part, rows = restrict(common, kept)
        assert type(part) is type(common)
        got = paged_attention(take(batch.query, rows), batch.cache, part, batch.block_size)
        expected = torch.cat([batch.dense()[batch.rows_of(request)] for request in kept])
        assert torch.allclose(got, expected, atol=1e-6)
        computed = [batch.requests[request][1] - batch.requests[request][0] for request in kept]
        assert part.compute_num_computed_tokens().tolist() == computed
        if hasattr(part, "req_idx"):
            assert isinstance(part.req_idx, np.ndarray) and part.req_idx.tolist() == [40 + request for request in kept]
        assert getattr(part, "_token_to_req_indices_cache", None) is None


def dense_kernel(
    self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any
) -> Any:
    """FlashAttention's forward without FlashAttention: from its own metadata and its own layout."""
    common: Any = types.SimpleNamespace(
        query_start_loc=metadata.query_start_loc,
        num_reqs=len(metadata.seq_lens),
        seq_lens=metadata.seq_lens,
        block_table_tensor=metadata.block_table,
    )
    rows = metadata.num_actual_tokens
    output[:rows] = paged_attention(query[:rows], cache, common, cache.shape[2], self.cache_layout.dim).to(output.dtype)
    return output


def second_runners(batch: PagedBatch, backend: Any, spec: Any, config: Any) -> Any:
    """What the second model runner's own functions make of a step, for "layer.0"."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata  # pyright: ignore[reportMissingImports]
    from vllm.v1.worker.utils import AttentionGroup  # pyright: ignore[reportMissingImports]

    group = AttentionGroup(backend, ["layer.0"], spec, 0)
    group.create_metadata_builders(config, torch.device("cpu"), kernel_block_size=16)
    common = batch.common
    names = inspect.signature(build_attn_metadata).parameters
    given = {
        **{name: getattr(common, name) for name in names if hasattr(common, name)},
        "attn_groups": [[group]],
        "num_tokens": common.num_actual_tokens,
        "query_start_loc_gpu": common.query_start_loc,
        "block_tables": [common.block_table_tensor],
        "slot_mappings": [common.slot_mapping],
        "kv_cache_config": types.SimpleNamespace(kv_cache_groups=[None]),
        "req_idx": np.arange(common.num_reqs),
    }
    return build_attn_metadata(**{name: value for name, value in given.items() if name in names})["layer.0"]


def an_engine_step() -> None:
    """Selection, layer, builder and a mixed step, over FlashAttention's own classes."""
    import vllm.config.vllm as config_module  # pyright: ignore[reportMissingImports]
    from vllm.v1.attention.backends import flash_attn  # pyright: ignore[reportMissingImports]
    from vllm.v1.attention.backends.registry import AttentionBackendEnum  # pyright: ignore[reportMissingImports]
    from vllm.v1.attention.selector import AttentionSelectorConfig  # pyright: ignore[reportMissingImports]
    from vllm.v1.kv_cache_interface import FullAttentionSpec  # pyright: ignore[reportMissingImports]

    config = engine_config(**SMALL)
    for part, values in ENGINE.items():
        holder = vars(config).setdefault(part, types.SimpleNamespace())
        vars(holder).update(values)
    config.model_config.get_num_attention_heads = lambda parallel: 4
    config.model_config.get_num_kv_heads = lambda parallel: 2
    config.model_config.get_head_size = lambda: 32
    config_module._current_vllm_config = config

    from flexprefill_fa.integrations import vllm_backend

    found = flash_attn.FlashAttentionBackend
    vllm_backend.current_platform = types.SimpleNamespace(
        is_cuda=lambda: True, get_attn_backend_cls=lambda *asked: f"{found.__module__}.{found.__qualname__}"
    )
    asked = AttentionSelectorConfig(32, torch.bfloat16, "auto", None)
    chooser: Any = AttentionBackendEnum["CUSTOM"].get_class()
    assert chooser.validate_configuration(device_capability=(9, 0), **asked._asdict()) == []
    module, name = chooser.full_cls_name()
    backend = getattr(sys.modules[module], name)
    assert issubclass(backend, found) and backend.get_name() == "FLASH_ATTN"

    flash_attn.FlashAttentionImpl.forward = dense_kernel
    layer = torch.nn.Module()
    layer.impl = backend.get_impl_cls()(4, 32, 32**-0.5, 2, None, None, "auto", None, "decoder", None)
    config.compilation_config.static_forward_context["layer.0"] = layer
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)

    batch = PagedBatch(MIXED, heads=4, kv_heads=2, head_dim=32, kv_dim=layer.impl.cache_layout.dim)
    metadata = second_runners(batch, backend, spec, config)
    assert [chunk.request for chunk in metadata.chunks] == [1, 3]
    assert type(metadata.rest) is flash_attn.FlashAttentionMetadata
    output = torch.full_like(batch.query, float("nan"))
    key = torch.empty(len(batch.query), 2, 32)
    layer.impl.forward(layer, batch.query, key, key, batch.cache, metadata, output=output)
    dense = batch.dense()
    assert not output.isnan().any()
    for request, pair in enumerate(MIXED):
        rows = batch.rows_of(request)
        close = torch.allclose(output[rows].double(), dense[rows], atol=1e-5)
        assert close == (request not in (1, 3)), (request, pair)
    counted = layer.impl.sparse_counter.read()
    assert (counted["chunks"], counted["failures"]) == (2, 0) and counted["density"] < 0.95


ENGINE: dict[str, dict[str, Any]] = {
    "model_config": {
        "rswa_window": None,
        "is_mm_prefix_lm": False,
        "hf_config": types.SimpleNamespace(model_type="llama"),
    },
    "parallel_config": {"cp_kv_cache_interleave_size": 1, "dcp_kv_cache_interleave_size": 1},
    "cache_config": {"cache_dtype": "auto"},
    "attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 32, "flash_attn_version": None},
    "kernel_config": {"enable_jit_warmup": False},
    "compilation_config": {
        "cudagraph_mode": types.SimpleNamespace(has_full_cudagraphs=lambda: False),
        "max_cudagraph_capture_size": 0,
    },
    "speculative_config": {"num_speculative_tokens": None},
}


def main(folder: Path) -> None:
    finder = put_in_place(folder)
    release = next(folder.glob("vllm-*.dist-info")).name.removeprefix("vllm-").removesuffix(".dist-info")
    version = tuple(int(part) for part in release.split(".")[:2])
    assert vllm_version.version_problem(release) is None, vllm_version.version_problem(release)
    assert vllm_version.version_warning(release) is None
    registering(folder, version)
    layouts(version)
    quantised_caches()
    a_part_of_a_step()
    an_engine_step()
    print("replaced:", ", ".join(sorted(finder.used)))
    print("shown for vLLM", release)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
