"""On a CUDA GPU: FlashPrefill and static patterns against references; attention, PeakPrefill's too, by an oracle."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import causal_oracle, relative_error
from torch import Tensor
from workloads import blocky_qk, random_qk, structured_qk

from flexprefill_fa import (
    BlockSelection,
    FlashPrefillConfig,
    PeakPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.backends import flash_problem
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.element import element_of
from flexprefill_fa.masks.flashprefill import reference
from flexprefill_fa.masks.selector import select_plain

pytestmark = pytest.mark.gpu

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
# Of P, relatively; with rounded means one between two numbers of the inputs' dtype may become either.
NEAR_TIE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES: list[dict[str, Any]] = [{}, {"starts": [0, 130]}, {"lengths": [1501, 1000]}, {"starts": [5, 700]}]


def assert_equals_reference(query: Tensor, key: Tensor, config: FlashPrefillConfig, **place: Any) -> BlockSelection:
    """The kernels' selection; equal to the reference's but for near ties."""
    got = select_blocks(query, key, config, **place)
    starts, lengths, grid = got.starts, got.lengths, got.grid
    lists = select_plain(query, key, starts, lengths, config)
    expected = replace(got, **dict(zip(LISTS, both_lists(lists), strict=True)))
    unequal = got.to_dense() != expected.to_dense()
    near = torch.zeros_like(unequal)
    for b, (start, end) in enumerate(got.ranges.tolist()):
        found = element_of(query[b], key[b], start, end, grid, query.shape[-1] ** -0.5)
        if found is None:  # all its queries are padding
            continue
        element, rows, columns = found
        scores = reference.block_scores(element)
        threshold = scores.amax(-1, keepdim=True) * config.alpha
        near[b, :, rows, columns] = (scores - threshold).abs() < NEAR_TIE[key.dtype] * threshold
    print({"unequal": unequal.sum().item(), "near": near.sum().item(), "density": got.density().mean().item()})
    assert not (unequal & ~near).any(), (unequal & ~near).nonzero()[:5]
    assert unequal.sum() <= 2 + 1e-3 * unequal.numel()
    return got


@pytest.mark.parametrize("n", [4096, 32768])
@pytest.mark.parametrize("alpha", [0.03, 0.1, 0.9, 1.0])
def test_flashprefill_equals_the_reference(n: int, alpha: float) -> None:
    heads, kv_heads = (16, 4) if n <= 8192 else (4, 1)
    for make, dtype in itertools.product((random_qk, blocky_qk, structured_qk), DTYPES):
        query, key = (x.to("cuda", dtype) for x in make(1, heads, kv_heads, n, n, 128, seed=n))
        config = FlashPrefillConfig(alpha, 1, 1, 0)
        got = assert_equals_reference(query, key, config)
        assert torch.equal(got.to_dense(), select_blocks(query, key, config).to_dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_flashprefill_of_every_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    for block_size, place in itertools.product((64, 128), PLACES):
        query, key = (x.to("cuda", dtype) for x in blocky_qk(2, 4, 2, 1501, 1501, head_dim, seed=head_dim))
        config = FlashPrefillConfig(0.5, 1, 1, 1, block_size)
        assert_equals_reference(query, key, config, **place)


@pytest.mark.parametrize("q_len", [1, 127, 129, 1000, 3000])
def test_flashprefill_with_padding_and_prefix(q_len: int) -> None:
    query, key = (x.cuda() for x in structured_qk(3, 4, 1, q_len, 3000, 64, seed=q_len))
    place: dict[str, Any] = {"starts": [0, 130, 1], "lengths": [3000, 2870, 2200]}
    for config in (FlashPrefillConfig(0.5, 0, 1, 0), FlashPrefillConfig(0.5, block_size=64)):
        assert_equals_reference(query, key, config, **place)


def test_large_keys_in_one_channel() -> None:
    """Keys far from zero, as some models have: the scores keep fp32's precision."""
    query, key = blocky_qk(1, 4, 2, 8192, 8192, 128)
    key[..., 7] += 100.0
    for dtype in DTYPES:
        q, k = (x.to("cuda", dtype) for x in (query, key))
        config = FlashPrefillConfig(0.5, 1, 1, 0)
        assert_equals_reference(q, k, config)


def test_scores_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (x.to("cuda", torch.bfloat16) for x in blocky_qk(2, 8, 2, 4096, 4096, 128))
    config = FlashPrefillConfig(0.5, 1, 1, 0)
    expected = select_blocks(query, key, config).to_dense()
    monkeypatch.setattr("flexprefill_fa.masks.flashprefill.kernels.SCORE_BYTES", 100_000)
    assert torch.equal(select_blocks(query, key, config).to_dense(), expected)


@pytest.mark.parametrize("config", [StreamingLLMConfig(200, 1000), VerticalSlashConfig(500, 1000, 64)], ids=str)
@pytest.mark.parametrize("q_len", [1, 129, 1501])
def test_static_patterns_equal_the_cpu(config: Any, q_len: int) -> None:
    for place in PLACES:
        query, key = structured_qk(2, 4, 2, q_len, 1501, 64)
        expected = select_blocks(query, key, config, **place).to_dense()
        got = select_blocks(query.cuda(), key.cuda(), config, **place).to_dense().cpu()
        differs = (got != expected).sum((-2, -1))
        assert (differs > 0).sum() <= 1, differs  # a near-tie may exchange a column or a diagonal of one head


CONFIGS: list[Any] = [
    FlashPrefillConfig(0.5, 1, 1, 0),
    PeakPrefillConfig(0.6),
    StreamingLLMConfig(128, 500),
    VerticalSlashConfig(300, 500),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_selection_can_be_captured(config: Any, padded: bool) -> None:
    """No synchronisation: a CUDA graph captures the selection, and a replay follows new inputs."""
    query, key = (x.to("cuda", torch.bfloat16) for x in blocky_qk(2, 4, 2, 3000, 3000, 128, seed=1))
    other_query, other_key = (x.to("cuda", torch.bfloat16) for x in blocky_qk(2, 4, 2, 3000, 3000, 128, seed=2))
    place: dict[str, Any] = {"starts": torch.tensor([0, 200], device="cuda")} if padded else {}
    expected = select_blocks(other_query, other_key, config, **place).to_dense()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks(query, key, config, **place)
    query.copy_(other_query)
    key.copy_(other_key)
    graph.replay()
    assert torch.equal(captured.to_dense(), expected)


ATTENTION = [  # heads, kv heads, q_len, kv_len, head_dim, dtype, starts, lengths
    (8, 2, 4096, 4096, 128, torch.bfloat16, None, None),
    (4, 4, 2049, 2049, 64, torch.float16, None, None),
    (8, 1, 1500, 4000, 128, torch.bfloat16, None, None),
    (4, 2, 3000, 3000, 128, torch.float16, [0, 300], [3000, 2500]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("backend", ["TRITON", "FLASH"])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: "-".join(map(str, c[:6])))
def test_attention_equals_the_oracle(case: tuple, backend: str, config: Any) -> None:
    """Within twice SDPA's own low-precision loss, and not by running dense."""
    heads, kv_heads, q_len, kv_len, head_dim, dtype, starts, lengths = case
    query, key = (x.to("cuda", dtype) for x in blocky_qk(2, heads, kv_heads, q_len, kv_len, head_dim, seed=1))
    value = torch.randn_like(key)
    if backend == "FLASH" and flash_problem(query, 128) is not None:
        pytest.skip(flash_problem(query, 128) or "")
    torch._dynamo.reset()
    out, selection = sparse_prefill_attention(
        query, key, value, config, dense="never", backend=backend, return_selection=True, starts=starts, lengths=lengths
    )
    assert torch.isfinite(out).all() and selection.density().mean() < 0.95
    expected, low, real = causal_oracle(query, key, value, selection)
    loss, error = relative_error(low, expected, real), relative_error(out, expected, real)
    assert error <= 2 * loss + 1e-6, (error, loss)
    dense, _, _ = causal_oracle(query, key, value, None, offset=kv_len - q_len, ranges=selection.ranges)
    assert relative_error(dense, expected, real) > 10 * error
