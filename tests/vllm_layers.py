"""Layers over the stand-ins for vLLM, steps for them, and running them."""

from __future__ import annotations

from typing import Any

import torch
from paged import SMALL, PagedBatch
from vllm_stubs import FakeVllm, engine_config, installed


def one_layer(vllm: FakeVllm, **settings: Any) -> tuple[Any, Any]:
    config = engine_config(**{**SMALL, **settings})
    backend = vllm.choose(config)
    return vllm.layer(backend, config, "layer.0"), vllm.builder(backend, config, ["layer.0"])


def run(layer: Any, metadata: Any, batch: PagedBatch) -> torch.Tensor:
    """`forward` as vLLM calls it, into an output of NaN."""
    output = torch.full_like(batch.query, float("nan"))
    key = torch.empty(len(batch.query), batch.kv_heads, batch.head_dim)
    assert layer.impl.forward(layer, batch.query, key, key, batch.cache, metadata, output=output) is output
    return output


def batch_of(requests: list[tuple[int, int]], **options: Any) -> PagedBatch:
    """With the cache and metadata of the release that is in place."""
    release = installed()
    batch = PagedBatch(requests, heads=4, kv_heads=2, head_dim=32, kv_dim=release.kv_dim, **options)
    batch.common = release.common(batch.common)
    return batch
