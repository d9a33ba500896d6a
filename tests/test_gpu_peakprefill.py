"""On a CUDA GPU: PeakPrefill's kernels against the plain rule on the same GPU, near ties counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comparison_peakprefill import explained
from torch import Tensor
from workloads import blocky_qk, needle_qk, random_qk, structured_qk

from flexprefill_fa import BlockSelection, PeakPrefillConfig, select_blocks
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.selector import select_plain

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES: list[dict[str, Any]] = [{}, {"starts": [0, 130]}, {"lengths": [1501, 1000]}, {"starts": [5, 700]}]
KINDS: list[Any] = ["clusters", "outliers"]


def assert_equals_the_rule(query: Tensor, key: Tensor, config: PeakPrefillConfig, **place: Any) -> BlockSelection:
    """The kernels' selection; equal to the rule's but for near ties, which are few; and the same when asked again."""
    got = select_blocks(query, key, config, **place)
    lists: Any = select_plain(query, key, got.starts, got.lengths, config)
    shape: tuple[Any, ...] = query.shape[2], key.shape[2], config.block_size
    expected = BlockSelection(*both_lists(lists), *shape).to_dense()
    unequal = got.to_dense() != expected
    near = explained(query, key, config, got.ranges, unequal)
    print({"unequal": unequal.sum().item(), "near": near.sum().item(), "density": got.density().mean().item()})
    assert not (unequal & ~near).any(), (unequal & ~near).nonzero()[:5]
    assert unequal.sum() <= 4 + 2e-3 * unequal.numel()
    assert torch.equal(select_blocks(query, key, config, **place).to_dense(), got.to_dense())
    return got


@pytest.mark.parametrize("n", [4096, 16384])
@pytest.mark.parametrize("peak", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_rule(dtype: torch.dtype, peak: float, n: int) -> None:
    heads, kv_heads = (16, 4) if n <= 8192 else (4, 1)
    densities = []
    for make, kind in itertools.product((random_qk, blocky_qk, structured_qk, needle_qk), KINDS):
        query, key = (x.to(DEVICE, dtype) for x in make(1, heads, kv_heads, n, n, 128, seed=n))
        config = PeakPrefillConfig(peak, kind, last_full_blocks=0)
        densities.append(assert_equals_the_rule(query, key, config).density().mean().item())
    assert min(densities) < 0.7, densities


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_every_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    for block_size, place, kind in itertools.product((64, 128), PLACES, KINDS):
        query, key = (x.to(DEVICE, dtype) for x in structured_qk(2, 4, 2, 1501, 1501, head_dim, seed=head_dim))
        assert_equals_the_rule(query, key, PeakPrefillConfig(0.3, kind, block_size=block_size), **place)


@pytest.mark.parametrize("per_block", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("variance", [True, False])
def test_every_number_of_representatives(per_block: int, variance: bool) -> None:
    for dtype, kind, make in itertools.product(DTYPES, KINDS, (blocky_qk, needle_qk)):
        query, key = (x.to(DEVICE, dtype) for x in make(2, 4, 2, 1500, 2500, 64, seed=per_block))
        assert_equals_the_rule(query, key, PeakPrefillConfig(0.3, kind, per_block, variance, 0))


@pytest.mark.parametrize("q_len", [1, 127, 129, 1000, 3000])
def test_padding_and_prefix(q_len: int) -> None:
    """What stands in the padding may be anything."""
    query, key = (x.to(DEVICE) for x in structured_qk(3, 4, 1, q_len, 3000, 64, seed=q_len))
    place: dict[str, Any] = {"starts": [0, 130, 1], "lengths": [3000, 2870, 2200]}
    offset = 3000 - q_len
    for tensor, first in ((query, offset), (key, 0)):
        tensor[1, :, : max(0, 130 - first)] = torch.nan
        tensor[2, :, max(0, 2201 - first) :] = torch.inf
    for config in (PeakPrefillConfig(0.3, last_full_blocks=0), PeakPrefillConfig(0.2, "outliers", 5, block_size=64)):
        assert_equals_the_rule(query, key, config, **place)


@pytest.mark.parametrize("n", [65536, 65537])
def test_fewer_representatives_in_long_sequences(n: int) -> None:
    """8 a block up to 65,536 positions, 4 from one more on."""
    query, key = (x.to(DEVICE, torch.bfloat16) for x in needle_qk(1, 2, 1, 2048, n, 64))
    found = assert_equals_the_rule(query, key, PeakPrefillConfig(0.1, last_full_blocks=0)).to_dense()
    by_count = {
        count: select_blocks(query, key, PeakPrefillConfig(0.1, "clusters", count, True, 0)) for count in (4, 8)
    }
    assert torch.equal(found, by_count[8 if n == 65536 else 4].to_dense())
    assert not torch.equal(by_count[4].to_dense(), by_count[8].to_dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_and_keys_at_their_limits(dtype: torch.dtype) -> None:
    """Flat scores, scores of some 10,000, keys far from zero in one channel, and equal keys."""
    for kind in KINDS:
        config = PeakPrefillConfig(0.3, kind, last_full_blocks=0)
        for sharpness in (1e-3, 30.0, 2000.0):
            query, key = (x.to(DEVICE, dtype) for x in random_qk(1, 4, 2, 3000, 3000, 64, sharpness=sharpness))
            assert_equals_the_rule(query, key, config)
        query, key = blocky_qk(1, 4, 2, 3000, 3000, 64)
        key[..., 7] += 100.0
        assert_equals_the_rule(query.to(DEVICE, dtype), key.to(DEVICE, dtype), config)
        for value in (0.0, 0.1):
            query, key = (x.to(DEVICE, dtype) for x in (query, torch.full_like(key, value)))
            assert_equals_the_rule(query, key, config)
