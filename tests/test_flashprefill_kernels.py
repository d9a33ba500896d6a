"""FlashPrefill's Triton kernels, by Triton's interpreter, against the plain reference."""

import math
from typing import Any

import pytest
import torch
from comparison_flashprefill import NEAR_TIE
from oracle_flashprefill import oracle_select
from workloads import blocky_qk, random_qk, structured_qk

from flexprefill_fa import BlockSelection, FlashPrefillConfig
from flexprefill_fa.grid import Grid
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.selector import select_plain

if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels run there, see test_gpu_selectors.py", allow_module_level=True)
kernels = pytest.importorskip("flexprefill_fa.masks.flashprefill.kernels")

pytestmark = pytest.mark.usefixtures("gpu_bf16")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PADDING = {"none": (None, None), "left": ([0, 70], None), "right": (None, [300, 233]), "both": ([64, 5], [200, 300])}
CASES = [  # kv_len, q_len, head_dim, block_size, dtype, padding, workload, (alpha, sink, window, last)
    (1, 1, 16, 64, FP32, "none", random_qk, (0.1, 2, 4, 2)),
    (127, 127, 64, 64, BF16, "none", structured_qk, (0.5, 0, 1, 0)),
    (129, 129, 16, 128, FP16, "none", blocky_qk, (0.9, 0, 1, 0)),
    (321, 321, 80, 64, FP16, "none", structured_qk, (0.3, 1, 1, 0)),
    (330, 330, 16, 64, FP32, "left", structured_qk, (0.3, 0, 1, 1)),
    (300, 300, 32, 64, FP32, "right", blocky_qk, (0.6, 0, 2, 0)),
    (320, 320, 16, 64, BF16, "both", blocky_qk, (0.6, 1, 1, 0)),
    (420, 350, 16, 64, FP32, "right", blocky_qk, (0.8, 0, 1, 0)),
    (333, 129, 256, 64, BF16, "none", blocky_qk, (0.7, 0, 1, 0)),
    (330, 127, 24, 64, FP32, "left", structured_qk, (1e-6, 0, 1, 0)),
    (300, 1, 16, 64, FP32, "none", random_qk, (1.0, 0, 1, 0)),
    (400, 400, 160, 128, FP32, "none", structured_qk, (1.0, 0, 1, 0)),
]


def as_tensor(values: list[int] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values)


def assert_same(got: Any, expected: Any, arguments: dict[str, Any], query: torch.Tensor, key: torch.Tensor) -> None:
    """Equal lists, except for near ties."""
    if all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
        return
    lengths: tuple[Any, ...] = query.shape[2], key.shape[2], arguments["block_size"]
    dense = [BlockSelection(*both_lists(lists), *lengths).to_dense() for lists in (got, expected)]
    margin = oracle_select(query, key, **arguments).margin
    unequal = (dense[0] != dense[1]).numpy()
    assert unequal.any() and (margin[unequal] < NEAR_TIE[key.dtype]).all(), margin[unequal]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])))
def test_kernels_select_what_the_reference_selects(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case)
    if case[0] > 300:  # narrow tiles, so that some need no mask, as at great lengths
        options = {"COLUMNS": 2, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr("flexprefill_fa.masks.flashprefill.kernels.scores.tile_options", lambda *_: options)
        check_case(case)


def check_case(case: tuple) -> None:
    kv_len, q_len, head_dim, block_size, dtype, padding, make, numbers = case
    starts, lengths = PADDING[padding]
    batch = 1 if padding == "none" else 2
    query, key = (x.to(dtype) for x in make(batch, 2, 1, q_len, kv_len, head_dim, seed=kv_len))
    names = ("alpha", "sink_blocks", "window_blocks", "last_full_blocks", "block_size")
    fields: dict[str, Any] = dict(zip(names, (*numbers, block_size), strict=True))
    config = FlashPrefillConfig(**fields)
    place: tuple[Any, Any] = as_tensor(starts), as_tensor(lengths)
    expected = select_plain(query, key, *place, config)
    got = kernels.select(query, key, *place, config, zero_tails=True)
    assert_same(got, expected, {**fields, "starts": starts, "lengths": lengths}, query, key)
    partial = kernels.select(query, key, *place, config, all_partial=True)
    assert (partial[1] == 0).all() and torch.equal(partial[0], got[0] + got[1])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 300.0])
def test_scores_are_as_exact_as_fp32(dtype: torch.dtype, size: float) -> None:
    """Of means in the inputs' dtype, whatever their range, one channel with large keys included: to 1e-6 of |q| |k|."""
    query, key = blocky_qk(1, 1, 1, 200, 200, 64, seed=1)
    key[..., 7] += 20.0
    query, key = ((x * size).to(dtype) for x in (query, key))
    grid, scale = Grid(200, 200, 64), 0.125 / size**2
    ranges = torch.tensor([[0, 200]], dtype=torch.int32)
    keys = kernels.pooled_keys(key, ranges, 64, scale)
    scores, best = torch.full((4, 4), torch.nan), torch.empty(4)
    kernels.block_scores(query, keys, ranges, scores, best, grid, 0)
    rows = scores.flip(0) * math.log(2)  # the last row block comes first
    mean = torch.stack([part.mean(1) for part in key.double()[0].split(64, 1)], 1).to(dtype).double()  # [1, 4, D]
    exact = query.double()[0] @ mean.mT * scale  # [1, 200, 4]
    bound = 1e-6 * (query.double().norm(dim=-1).max() * mean.norm(dim=-1).max() * scale + 1)
    for i in range(4):
        for j in range(i):  # every query of these counts
            expected = exact[0, i * 64 : (i + 1) * 64, j].logsumexp(0)
            assert abs(rows[i, j] - expected) <= bound, (i, j, rows[i, j] - expected, bound)


def test_scores_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scores of all heads would take too much memory, a few rows at a time give the same."""
    query, key = blocky_qk(2, 4, 2, 300, 300, 16)
    config = FlashPrefillConfig(0.6, 1, 1, 0, 64)
    expected = kernels.select(query, key, None, None, config, zero_tails=True)
    launches = []
    write = kernels.write_rows
    monkeypatch.setattr(kernels, "SCORE_BYTES", 4 * 5 * 13)  # 13 of 40 rows of 5 blocks
    monkeypatch.setattr(kernels, "write_rows", lambda *a, **k: (launches.append(len(a[1])), write(*a, **k)))
    got = kernels.select(query, key, None, None, config, zero_tails=True)
    assert launches == [13, 13, 13, 1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_long_rows_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = blocky_qk(1, 2, 1, 500, 900, 16)
    config = FlashPrefillConfig(0.6, 1, 1, 0, 64)
    starts = torch.tensor([70])
    expected = kernels.select(query, key, starts, None, config, zero_tails=True)
    monkeypatch.setattr("flexprefill_fa.masks.flashprefill.kernels.rows.CHUNK", 4)
    got = kernels.select(query, key, starts, None, config, zero_tails=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_lists_are_written_into_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave unwritten is never read: poisoned scratch memory changes nothing."""
    query, key = blocky_qk(2, 2, 1, 300, 300, 24)
    config = FlashPrefillConfig(0.6, 1, 1, 0, 64)
    starts = torch.tensor([0, 70])
    expected = kernels.select(query, key, starts, None, config, zero_tails=True)
    clean = torch.empty
    for poison in (float("nan"), float("inf")):

        def poisoned(*shape, poison=poison, **kwargs):
            tensor = clean(*shape, **kwargs)
            return tensor.fill_(poison if tensor.is_floating_point() else 77)

        monkeypatch.setattr(torch, "empty", poisoned)
        got = kernels.select(query, key, starts, None, config, zero_tails=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_padding_may_hold_anything() -> None:
    query, key = blocky_qk(1, 2, 1, 300, 300, 16)
    config = FlashPrefillConfig(0.6, 1, 1, 0, 64)
    place = torch.tensor([70]), torch.tensor([200])
    expected = kernels.select(query, key, *place, config, zero_tails=True)
    for tensor in (query, key):
        tensor[:, :, :70] = torch.nan
        tensor[:, :, 270:] = torch.inf
    got = kernels.select(query, key, *place, config, zero_tails=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(select_plain(query, key, *place, config), expected, strict=True))


def test_zero_inputs_keep_everything() -> None:
    """All scores equal: no exponent, no NaN."""
    zeros = torch.zeros(1, 1, 300, 16)
    config = FlashPrefillConfig(0.9, 0, 1, 0, 64)
    got = kernels.select(zeros, zeros, None, None, config)
    assert got[0].sum() + got[1].sum() == 5 * 6 // 2


def test_strided_inputs() -> None:
    query, key = blocky_qk(1, 2, 1, 200, 200, 32)
    config = FlashPrefillConfig(0.6, 0, 1, 0, 64)
    expected = kernels.select(query, key, None, None, config, zero_tails=True)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    by_dim = [x.mT.contiguous().mT for x in (query, key)]
    for inputs in (by_token, by_dim):
        got = kernels.select(*inputs, None, None, config, zero_tails=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_too_many_blocks() -> None:
    query = torch.zeros(1, 1, 1, 16)
    key = torch.zeros(1, 1, 1, 16).expand(1, 1, 2**15 * 64, 16)
    with pytest.raises(ValueError, match="at most 32767 key blocks of 64 tokens can be selected from, got 32768"):
        kernels.select(query, key, None, None, FlashPrefillConfig(block_size=64))
