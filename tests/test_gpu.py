"""On a CUDA GPU: the Triton kernels against the reference, and compiled attention against an fp64 oracle."""

import itertools
from typing import Any, get_args

import pytest
import torch
from oracle import causal_oracle, relative_error
from torch.nn.attention.flex_attention import flex_attention
from workloads import random_qk, structured_qk

from flexprefill_fa import FlexPrefillConfig, create_flexprefill_block_mask, select_blocks, sparse_prefill_attention
from flexprefill_fa.backends import flash_problem, resolve_backend
from flexprefill_fa.cost_model import prefers_dense
from flexprefill_fa.cuda_graphs import PrefillGraph
from flexprefill_fa.dense import causal_attention
from flexprefill_fa.masks.flexprefill.config import Variant
from flexprefill_fa.masks.selector import select_plain
from flexprefill_fa.selection import BlockSelection

pytestmark = pytest.mark.gpu

SETTINGS = [
    {"tau": 0.0, "gamma": 0.9},
    {"tau": 0.1, "gamma": 0.95},
    {"tau": 0.5, "gamma": 0.95, "max_budget": 4096},
]


def by_reference(query, key, config, starts=None, lengths=None):
    """The reference's selection, on the GPU's own copy of the numbers."""
    lists = select_plain(query, key, starts, lengths, config)
    return BlockSelection.of(lists, config.diagnostics, query, key, config.block_size, starts, lengths)


def assert_nearly_equal(got: BlockSelection, expected: BlockSelection) -> None:
    """Equal but for ties that fp32 summation order decides.

    Where the sorted sum of 100,000 block scores crosses the threshold, a few cells may fall either way in any head; a
    count of tokens at the edge of a block moves a whole column or diagonal, which may happen in one head.
    """
    differs = got.to_dense() != expected.to_dense()
    share = (differs.sum((-2, -1)) / expected.kept_blocks().clamp(min=1)).flatten()
    print({"unequal_heads": (share > 0).sum().item(), "heads": share.numel(), "largest_share": share.max().item()})
    assert (share > 1e-4).sum() <= 1, share[share > 0]
    assert share.max() <= 0.02, share.max()


@pytest.mark.parametrize("n", [4096, 32768, 65536])
@pytest.mark.parametrize("variant", ["published", "paper"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"tau{s['tau']}")
def test_selection_equals_the_reference(n: int, variant: Any, settings: dict) -> None:
    heads, kv_heads = (16, 4) if n <= 8192 else (8, 2) if n <= 32768 else (4, 1)
    for make, dtype in itertools.product((random_qk, structured_qk), (torch.float32, torch.bfloat16)):
        query, key = (x.to("cuda", dtype) for x in make(1, heads, kv_heads, n, n, 128, seed=n))
        config = FlexPrefillConfig(variant=variant, min_budget=512, **settings)
        got = select_blocks(query, key, config)
        expected = by_reference(query, key, config)
        assert_nearly_equal(got, expected)
        assert torch.allclose(got.js_distance, expected.js_distance, atol=2e-4, equal_nan=True)
        again = select_blocks(query, key, config)
        assert torch.equal(got.to_dense(), again.to_dense())
        assert torch.equal(got.js_distance.nan_to_num(), again.js_distance.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 192, 256])
def test_selection_of_every_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    for block_size, variant in itertools.product((64, 128), ("published", "paper")):
        query, key = (x.to("cuda", dtype) for x in structured_qk(2, 4, 2, 1501, 1501, head_dim, seed=head_dim))
        config = FlexPrefillConfig(min_budget=128, block_size=block_size, variant=variant, tau=0.3)
        assert_nearly_equal(select_blocks(query, key, config), by_reference(query, key, config))


@pytest.mark.parametrize("q_len", [1, 127, 129, 1000, 3000])
def test_selection_with_padding_and_prefix(q_len: int) -> None:
    for variant in get_args(Variant):
        query, key = (x.cuda() for x in structured_qk(3, 4, 1, q_len, 3000, 64, seed=q_len))
        starts, lengths = torch.tensor([0, 130, 1], device="cuda"), torch.tensor([3000, 2870, 2200], device="cuda")
        config = FlexPrefillConfig(min_budget=256, variant=variant, tau=0.2)
        got = select_blocks(query, key, config, starts=starts, lengths=lengths)
        assert_nearly_equal(got, by_reference(query, key, config, starts.int(), lengths.int()))


ATTENTION = [  # batch, heads, kv heads, q_len, kv_len, head_dim, dtype, block_size, starts, lengths
    (1, 8, 2, 4096, 4096, 128, torch.bfloat16, 128, None, None),
    (2, 4, 4, 2049, 2049, 64, torch.float16, 128, None, None),
    (2, 8, 1, 1500, 4000, 128, torch.bfloat16, 128, None, None),
    (2, 4, 2, 3000, 3000, 128, torch.float16, 128, [0, 300], [3000, 2500]),
    (2, 4, 2, 2000, 2500, 64, torch.bfloat16, 128, [700, 0], None),
    (1, 4, 2, 60, 3000, 128, torch.bfloat16, 128, None, None),
]
TRITON_ONLY = [
    (1, 4, 2, 3001, 3001, 80, torch.bfloat16, 64, None, None),
    (1, 4, 2, 2000, 2000, 128, torch.float32, 128, None, None),
    (2, 4, 2, 2000, 2000, 128, torch.float32, 64, [5, 900], None),
    (1, 2, 2, 2000, 2000, 256, torch.bfloat16, 128, None, None),
    (1, 2, 1, 2000, 2000, 256, torch.bfloat16, 64, None, None),
    (1, 2, 2, 1500, 1500, 112, torch.float16, 128, None, None),
    (1, 2, 1, 700, 1500, 192, torch.bfloat16, 64, None, None),
    (1, 2, 2, 1500, 1500, 16, torch.float16, 64, None, None),
]


def check_attention(case: tuple, backend: str) -> None:
    """Sparse attention equals the oracle over the selected blocks, within twice SDPA's own low-precision loss."""
    batch, heads, kv_heads, q_len, kv_len, head_dim, dtype, block_size, starts, lengths = case
    query, key = (x.to("cuda", dtype) for x in structured_qk(batch, heads, kv_heads, q_len, kv_len, head_dim, seed=1))
    value = torch.randn(batch, kv_heads, kv_len, head_dim, device="cuda", dtype=dtype)
    config = FlexPrefillConfig(gamma=0.8, min_budget=128, block_size=block_size)
    place = {"starts": starts, "lengths": lengths}
    out, selection = sparse_prefill_attention(
        query, key, value, config, dense="never", backend=backend, return_selection=True, **place
    )
    assert torch.isfinite(out).all()
    assert selection.density().mean() < 0.95
    expected, low, real = causal_oracle(query, key, value, selection)
    loss, error = relative_error(low, expected, real), relative_error(out, expected, real)
    assert error <= 2 * loss + 1e-6, (error, loss)
    dense, _, _ = causal_oracle(query, key, value, None, offset=kv_len - q_len, ranges=selection.ranges)
    assert relative_error(dense, expected, real) > 20 * error  # it did not run dense
    mask = create_flexprefill_block_mask(query, key, config=config, **place)
    options: Any = {"BACKEND": backend} | ({"BLOCK_M": 64, "BLOCK_N": 32} if backend == "TRITON" else {})
    flex = torch.compile(flex_attention, fullgraph=True)
    by_mask = flex(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options)
    assert relative_error(by_mask, expected, real) <= 2 * loss + 1e-6


@pytest.mark.parametrize("case", ATTENTION + TRITON_ONLY, ids=lambda c: "-".join(map(str, c[:8])))
def test_triton_attention_equals_the_oracle(case: tuple) -> None:
    torch._dynamo.reset()
    check_attention(case, "TRITON")


@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: "-".join(map(str, c[:8])))
def test_flash_attention_equals_the_oracle(case: tuple) -> None:
    query = torch.empty(1, 1, 1, case[5], device="cuda", dtype=case[6])
    problem = flash_problem(query, case[7])
    if problem and "not installed" in problem:
        pytest.skip(problem)
    assert problem is None
    torch._dynamo.reset()
    check_attention(case, "FLASH")


def test_one_graph_serves_every_length() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for n, gamma in ((1500, 0.9), (2048, 0.8), (4000, 0.7), (700, 0.95)):
        query, key = (x.to("cuda", torch.bfloat16) for x in structured_qk(2, 4, 2, n, n, 128))
        config = FlexPrefillConfig(gamma=gamma, min_budget=128)
        value = torch.randn_like(key)
        backend = resolve_backend("auto", query, 128)
        out, selection = sparse_prefill_attention(
            query, key, value, config, dense="never", backend=backend, return_selection=True
        )
        assert selection.density().max() < 1
        expected, _, real = causal_oracle(query, key, value, selection)
        assert relative_error(out, expected, real) < 0.01
        dense, _, _ = causal_oracle(query, key, value, None, ranges=selection.ranges)
        assert relative_error(dense, expected, real) > 0.05
    # The Triton kernel has one more for lengths that need no bounds checks.
    assert counters["stats"]["unique_graphs"] == (1 if backend == "FLASH" else 2)


CAPTURED = [
    ({"tau": 0.3}, False),
    ({"tau": 0.3, "max_budget": 1024}, True),
    ({"tau": 0.3, "variant": "paper"}, False),
    ({"tau": 0.3, "variant": "paper", "max_budget": 1024}, True),
]


@pytest.mark.parametrize(("settings", "padded"), CAPTURED, ids=str)
def test_selection_waits_for_nothing_and_can_be_captured(settings: dict, padded: bool) -> None:
    """No synchronisation in the selector: a CUDA graph captures it, and a replay follows new inputs."""
    config = FlexPrefillConfig(min_budget=256, **settings)
    query, key = (x.to("cuda", torch.bfloat16) for x in structured_qk(2, 4, 2, 3000, 3000, 128, seed=1))
    other_query, other_key = (x.to("cuda", torch.bfloat16) for x in structured_qk(2, 4, 2, 3000, 3000, 128, seed=2))
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


@pytest.mark.parametrize("variant", ["published", "paper"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_warm_call_waits_for_nothing(variant: Any, padded: bool) -> None:
    """Selection and attention together never wait for the GPU."""
    query, key = (x.to("cuda", torch.bfloat16) for x in structured_qk(1, 4, 2, 3000, 3000, 128, seed=1))
    value = key.clone()
    config = FlexPrefillConfig(min_budget=256, gamma=0.8, variant=variant)
    backend = resolve_backend("auto", query, 128)
    place: dict[str, Any] = {"starts": torch.tensor([100], device="cuda")} if padded else {}
    _, selection = sparse_prefill_attention(
        query, key, value, config, dense="never", backend=backend, return_selection=True, **place
    )
    assert selection.density().mean() < 0.95
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_prefill_attention(query, key, value, config, dense="never", backend=backend, **place)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["FLASH", "TRITON"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prefill_graph_follows_its_inputs(backend: str, padded: bool) -> None:
    """A replay on other inputs equals the eager call on them, whatever became of the memory in between."""
    first, second = (
        [x.to("cuda", torch.bfloat16) for x in structured_qk(1, 4, 2, 3000, 3000, 128, seed=seed)] for seed in (1, 2)
    )
    if flash_problem(first[0], 128) is not None and backend == "FLASH":
        pytest.skip(flash_problem(first[0], 128) or "")
    config = FlexPrefillConfig(min_budget=256, gamma=0.8)
    values = [torch.randn_like(key) for _, key in (first, second)]
    place: dict[str, Any] = {"starts": [200], "lengths": [2500]} if padded else {}
    graph = PrefillGraph(first[0], first[1], values[0], config, dense="never", backend=backend, **place)
    poison = [torch.full((size,), 10**6, dtype=torch.int32, device="cuda") for size in (1, 2, 64, 4096) * 50]
    for (query, key), value in ((second, values[1]), (first, values[0])):
        expected, selection = sparse_prefill_attention(
            query, key, value, config, dense="never", backend=backend, return_selection=True, **place
        )
        assert selection.density().mean() < 0.95
        real = slice(200, 2700) if padded else slice(None)
        assert torch.equal(graph(query, key, value)[:, :, real], expected[:, :, real])
    assert len(poison) == 200
    query, key = first
    with pytest.raises(ValueError, match="captured for a query"):
        graph(query[:, :, :2900], key, values[0])
    with pytest.raises(ValueError, match="requires grad"):
        graph(query.clone().requires_grad_(), key, values[0])
    with pytest.raises(ValueError, match="return_selection"):
        PrefillGraph(query, key, values[0], config, return_selection=True)
    with pytest.raises(ValueError, match="starts"):
        PrefillGraph(query, key, values[0], config, starts=[-1])


@pytest.mark.parametrize("backend", ["flash_attn_4", "FLASH", "TRITON"])
def test_dense_causal_attention_by_a_named_kernel(backend: str) -> None:
    query, key = (x.to("cuda", torch.bfloat16) for x in structured_qk(2, 4, 2, 1000, 1000, 128, seed=3))
    value = torch.randn_like(key)
    if backend != "TRITON" and flash_problem(query, 128) is not None:
        pytest.skip(flash_problem(query, 128) or "")
    expected = causal_attention(query.float(), key.float(), value.float())
    for n in (1000, 896):  # with and without bounds checks
        parts = [x[:, :, :n] for x in (query, key, value)]
        odd = [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in parts]  # rows begin at odd addresses
        for q, k, v in (parts, odd) if backend == "flash_attn_4" else (parts,):
            got = causal_attention(q, k, v, backend)
            assert relative_error(got, expected[:, :, :n], torch.ones((), device="cuda")) < 0.01


def test_the_cost_model_decides_what_auto_runs() -> None:
    """Short of the predicted crossover "auto" is dense, an explicit backend never is."""
    query = torch.randn(1, 32, 4096, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
    config = FlexPrefillConfig(gamma=0.9, min_budget=128, tau=0.0, max_budget=None)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the model has no rates for this GPU")
    backend = resolve_backend("auto", query, 128)
    assert prefers_dense(query, key, config, backend)
    dense = causal_attention(query, key, key.clone())
    automatic = sparse_prefill_attention(query, key, key.clone(), config)
    explicit = sparse_prefill_attention(query, key, key.clone(), config, dense="never", backend="TRITON")
    everything = torch.ones((), device="cuda")
    rounding = relative_error(automatic, dense, everything)
    assert rounding < 0.005
    assert relative_error(explicit, dense, everything) > 5 * rounding  # most blocks are kept, not all
    long = torch.empty(1, 32, 65536, 128, device="cuda", dtype=torch.bfloat16)
    assert not prefers_dense(long, long[:, :8], config, backend)
