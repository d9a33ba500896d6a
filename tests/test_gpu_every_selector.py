"""On a CUDA GPU: every selector selects as on the CPU, waits for nothing, and its attention equals an oracle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_selector import define_documented, example, names
from oracle import causal_oracle, relative_error
from workloads import blocky_qk, needle_qk

from flexprefill_fa import select_blocks, sparse_prefill_attention

pytestmark = pytest.mark.gpu
every = pytest.mark.parametrize("name", names())


@pytest.fixture(autouse=True, scope="module")
def selectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    define_documented(folder)
    return folder


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_blocks_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """But for a few near ties: the order of sums is another."""
    for make in (blocky_qk, needle_qk):
        query, key = (x.to(dtype) for x in make(2, 4, 2, 1200, 1500, 64))
        place: dict[str, Any] = {"starts": [0, 130], "lengths": [1500, 1300]}
        config = example(name, 128)
        expected = select_blocks(query, key, config, **place).to_dense()
        found = select_blocks(query.cuda(), key.cuda(), config, **place).to_dense().cpu()
        assert (found != expected).float().mean() < 2e-3 and expected.float().mean() < 0.6


@every
def test_a_selection_without_padding_waits_for_nothing(name: str) -> None:
    query, key = (x.to("cuda", torch.bfloat16) for x in blocky_qk(2, 4, 2, 1300, 1500, 64))
    config = example(name, 128)
    expected = select_blocks(query, key, config).to_dense()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = select_blocks(query, key, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.to_dense(), expected)


@every
def test_attention(name: str) -> None:
    query, key = (x.to("cuda", torch.bfloat16) for x in blocky_qk(2, 4, 2, 1500, 1500, 128))
    value = torch.randn_like(key)
    with torch.no_grad():
        out, selection = sparse_prefill_attention(
            query, key, value, example(name, 128), dense="never", return_selection=True
        )
    expected, low, real = causal_oracle(query, key, value, selection)
    assert relative_error(out, expected, real) <= 2 * relative_error(low, expected, real) + 1e-6
    dense, _, _ = causal_oracle(query, key, value, None, ranges=selection.ranges)
    assert relative_error(dense, expected, real) > 0.02, "dense attention would pass too"
