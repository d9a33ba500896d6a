"""PeakPrefill's Triton kernels, by Triton's interpreter, against the plain rule.

The interpreter does not multiply bf16, so inputs are fp32 and fp16 here; test_gpu_peakprefill.py has bf16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison_peakprefill import NEAR_TIE, ask_oracle
from torch import Tensor
from workloads import blocky_qk, needle_qk, random_qk, structured_qk

from flexprefill_fa import BlockSelection, PeakPrefillConfig
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.selector import select_plain

if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels run there, see test_gpu_peakprefill.py", allow_module_level=True)
kernels = pytest.importorskip("flexprefill_fa.masks.peakprefill.kernels")

FP16, FP32 = torch.float16, torch.float32
PADDING = {"none": (None, None), "left": ([0, 70], None), "right": (None, [300, 233]), "both": ([64, 5], [200, 300])}
CASES = [  # kv_len, q_len, head_dim, block_size, dtype, padding, workload, (peak, kind, per_block, variance, last)
    (1, 1, 16, 64, FP32, "none", random_qk, (0.2, "clusters", None, True, 1)),
    (127, 127, 64, 64, FP16, "none", structured_qk, (0.2, "clusters", 3, True, 0)),
    (129, 129, 16, 128, FP16, "none", blocky_qk, (0.2, "outliers", 8, True, 0)),
    (321, 321, 80, 64, FP16, "none", structured_qk, (0.2, "clusters", 3, True, 0)),
    (257, 257, 16, 64, FP32, "none", structured_qk, (0.3, "clusters", None, True, 0)),
    (330, 330, 16, 64, FP32, "left", structured_qk, (0.2, "clusters", 2, True, 1)),
    (300, 300, 32, 64, FP32, "right", blocky_qk, (0.5, "outliers", 3, False, 0)),
    (320, 320, 16, 64, FP16, "both", blocky_qk, (0.5, "clusters", 3, True, 0)),
    (420, 350, 16, 64, FP32, "right", blocky_qk, (0.4, "outliers", 3, True, 3)),
    (333, 129, 256, 64, FP32, "none", blocky_qk, (0.3, "clusters", 1, True, 0)),
    (330, 127, 24, 64, FP32, "left", structured_qk, (0.1, "outliers", 16, True, 0)),
    (257, 100, 16, 64, FP32, "none", structured_qk, (0.1, "clusters", 16, True, 0)),
    (300, 1, 16, 64, FP32, "none", random_qk, (0.3, "outliers", 1, True, 0)),
    (600, 600, 160, 128, FP32, "none", structured_qk, (0.2, "clusters", 3, False, 0)),
    (600, 500, 32, 64, FP16, "left", needle_qk, (0.2, "outliers", 5, True, 0)),
    (600, 200, 32, 64, FP32, "none", needle_qk, (0.05, "clusters", 3, True, 0)),
]


def as_tensor(values: list[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)


def to_dense(lists: Any, query: Tensor, key: Tensor, block_size: int) -> Tensor:
    shape: tuple[Any, ...] = query.shape[2], key.shape[2], block_size
    return BlockSelection(*both_lists(lists), *shape).to_dense()


def same(got: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def check(query: Tensor, key: Tensor, config: PeakPrefillConfig, starts: Any = None, lengths: Any = None) -> Any:
    """The kernels' lists, which are those of the plain rule but for named near ties."""
    place = as_tensor(starts), as_tensor(lengths)
    expected = select_plain(query, key, *place, config)
    got = kernels.select(query, key, *place, config, zero_tails=True)
    if not same(got, expected):
        dense = [to_dense(lists, query, key, config.block_size) for lists in (got, expected)]
        margin = ask_oracle(query, key, config, starts, lengths).margin
        unequal = (dense[0] != dense[1]).numpy()
        assert unequal.any() and (margin[unequal] < NEAR_TIE[query.dtype]).all(), margin[unequal]
    return got


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])))
def test_kernels_select_what_the_rule_selects(case: tuple) -> None:
    kv_len, q_len, head_dim, block_size, dtype, padding, make, settings = case
    query, key = (x.to(dtype) for x in make(1 if padding == "none" else 2, 2, 1, q_len, kv_len, head_dim, seed=kv_len))
    names = ("peak", "representatives", "per_block", "variance", "last_full_blocks")
    config = PeakPrefillConfig(**dict(zip(names, settings, strict=True)), block_size=block_size)
    check(query, key, config, *PADDING[padding])


def test_repeated_and_in_one_list() -> None:
    query, key = blocky_qk(1, 2, 1, 200, 330, 16)
    config, place = PeakPrefillConfig(0.5, "outliers", 2, block_size=64), (torch.tensor([70]), None)
    got = kernels.select(query, key, *place, config, zero_tails=True)
    assert same(kernels.select(query, key, *place, config, zero_tails=True), got)
    partial = kernels.select(query, key, *place, config, all_partial=True, zero_tails=True)
    assert (partial[1] == 0).all() and torch.equal(partial[0], got[0] + got[1]) and got[1].sum() > 0
    kept = [to_dense(lists, query, key, 64) for lists in (got, partial)]
    assert torch.equal(*kept) and not kept[0][:, :, -1, :-1].all()


@pytest.mark.parametrize("per_block", [3, 16])
def test_more_blocks_than_a_tile(monkeypatch: pytest.MonkeyPatch, per_block: int) -> None:
    """Notes of tiles stand in the list that is written; of few blocks kept, and of nearly all."""
    monkeypatch.setattr("flexprefill_fa.masks.peakprefill.kernels.representatives.tile_width", lambda *_: 16)
    query, key = structured_qk(1, 2, 1, 129, 1000, 16, seed=2)
    for peak, most in ((0.5, 2 * 9), (1e-6, 2 * 15)):
        config = PeakPrefillConfig(peak, "outliers", per_block, last_full_blocks=0, block_size=64)
        got = check(query, key, config, [70])
        assert most - 16 < (got[0] + got[1])[0, :, 0].sum() <= most
    query, key = random_qk(1, 12, 1, 1, 700, 16, sharpness=40.0)  # a tile may hold a far larger score than those before
    check(query, key, PeakPrefillConfig(0.95, "outliers", per_block, last_full_blocks=0, block_size=64))


@pytest.mark.parametrize(
    ("dtype", "sharpness", "kind", "peak"),
    [
        (FP16, 1e-3, "outliers", 0.7),
        (FP32, 30.0, "clusters", 0.3),
        (FP32, 2e3, "outliers", 0.9),
        (FP16, 2e3, "outliers", 0.3),
    ],
)
def test_flat_and_peaked_scores(dtype: torch.dtype, sharpness: float, kind: Any, peak: float) -> None:
    """Up to some 10,000, where a row's local blocks say nothing of its largest score."""
    query, key = (x.to(dtype) for x in random_qk(1, 2, 1, 260, 390, 32, sharpness=sharpness))
    check(query, key, PeakPrefillConfig(peak, kind, 2, True, 0, 64))


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_equal_keys(kind: Any, value: float) -> None:
    query, key = blocky_qk(1, 2, 1, 200, 390, 16)
    got = check(query, torch.full_like(key, value), PeakPrefillConfig(0.5, kind, 3, True, 0, 64))
    assert got[0].sum() + got[1].sum() > 0


def test_written_into_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave unwritten is never read: poisoned scratch memory changes nothing."""
    query, key = blocky_qk(2, 2, 1, 130, 300, 24)
    config, starts = PeakPrefillConfig(0.5, "outliers", 3, last_full_blocks=0, block_size=64), torch.tensor([0, 70])
    expected = kernels.select(query, key, starts, None, config, zero_tails=True)
    clean = torch.empty

    def poisoned(*shape, **kwargs):
        tensor = clean(*shape, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert same(kernels.select(query, key, starts, None, config, zero_tails=True), expected)


def test_padding_may_hold_anything() -> None:
    query, key = blocky_qk(1, 2, 1, 300, 300, 16)
    config = PeakPrefillConfig(0.5, "clusters", 2, last_full_blocks=0, block_size=64)
    place = torch.tensor([70]), torch.tensor([200])
    expected = kernels.select(query, key, *place, config, zero_tails=True)
    for tensor in (query, key):
        tensor[:, :, :70] = torch.nan
        tensor[:, :, 270:] = torch.inf
    assert same(kernels.select(query, key, *place, config, zero_tails=True), expected)


def test_strided_inputs() -> None:
    query, key = blocky_qk(1, 2, 1, 200, 200, 32)
    config = PeakPrefillConfig(0.5, "outliers", 3, last_full_blocks=0, block_size=64)
    expected = kernels.select(query, key, None, None, config, zero_tails=True)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    by_dim = [x.mT.contiguous().mT for x in (query, key)]
    for inputs in (by_token, by_dim):
        assert same(kernels.select(*inputs, None, None, config, zero_tails=True), expected)


def test_too_many_blocks() -> None:
    query = torch.zeros(1, 1, 1, 16)
    with pytest.raises(ValueError, match="at most 32767 key blocks of 64 tokens can be selected from, got 32768"):
        kernels.select(query, query.expand(1, 1, 2**15 * 64, 16), None, None, PeakPrefillConfig(block_size=64))
