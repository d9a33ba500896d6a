"""What PeakPrefill promises: one row is enough, what is always kept, settings, and inputs at their limits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from comparison_peakprefill import ask_oracle, compare
from torch import Tensor
from workloads import blocky_qk, structured_qk

from flexprefill_fa import FlashPrefillConfig, PeakPrefillConfig, XAttentionConfig, select_blocks
from flexprefill_fa.grid import Grid, visible_blocks
from flexprefill_fa.masks.element import element_of
from flexprefill_fa.masks.peakprefill import representatives

pytestmark = pytest.mark.usefixtures("one_thread")


def absorbed_qk(q_len: int, kv_len: int, block_size: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Queries that attend to the first block with a real key, and to no other."""
    query, key = blocky_qk(1, 2, 1, q_len, kv_len, 16)
    query[..., 0], key[..., 0] = 20.0, 0.0
    key[:, :, start : (start // block_size + 1) * block_size, 0] = 20.0
    return query, key


def kept(query: Tensor, key: Tensor, config: Any, **place: Any) -> Tensor:
    return select_blocks(query, key, config, **place).to_dense()


# --- One row is enough ------------------------------------------------------------------------------------------------


def test_one_row_keeps_a_block_that_its_query_block_does_not_need() -> None:
    """Row 1500 looks for key 700 alone, all others for the first block: published rules drop what it needs."""
    generator = torch.Generator().manual_seed(0)
    query, key = (0.1 * torch.randn(1, 1, 2048, 64, generator=generator) for _ in range(2))
    query[..., 0] = key[:, :, :128, 0] = 8.0  # scores of 8 where all others have 0
    query[:, :, 1500] = 0
    query[:, :, 1500, 1] = key[:, :, 700, 1] = 10.0  # 12.5
    shares = (query[0, 0, 1500] @ key[0, 0, :1501].T / 8).softmax(0)
    assert shares[700] > 0.9
    row, needed = 1500 // 128, 700 // 128
    for kind in ("clusters", "outliers"):
        config = PeakPrefillConfig(representatives=kind)
        keep = kept(query, key, config)[0, 0]
        assert keep[row].nonzero().flatten().tolist() == [0, needed, row]
        assert keep[row - 1].nonzero().flatten().tolist() == [0, row - 1]
        compare(select_blocks(query, key, config), ask_oracle(query, key, config), torch.float32)
    for config in (FlashPrefillConfig(), XAttentionConfig()):
        assert not kept(query, key, config)[0, 0, row, needed], config
        assert not kept(query, key, config).all()


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
def test_rows_count_each_by_itself(kind: Any) -> None:
    """A share of `peak` in one row keeps a block; a little less does not, in however many rows."""
    peak, n, outlier, row = 0.2, 1600, 130, 24
    config = PeakPrefillConfig(peak, kind, 2, True, 0, 64)
    for rows in (1, 16, 64):
        for factor, expected in ((1.01, True), (0.99, False)):
            query, key = torch.zeros(1, 1, n, 16), torch.zeros(1, 1, n, 16)
            key[:, :, outlier, 0] = key[:, :, :64, 1] = 8.0
            query[..., 1] = 8.0  # the first block has all of these rows
            place = row * 64 + torch.arange(64 - rows, 64)
            query[0, 0, place, 1] = 0.0
            wanted = factor * peak
            # e^0 for each key but block 2's; 22 blocks between lose an outlier, which counts less than the rest.
            others = (place + 1 - 64 - (22 if kind == "outliers" else 0)).double()
            query[0, 0, place, 0] = (wanted / (1 - wanted) * others).log().float() / 8.0
            keep = select_blocks(query, key, config, scale=1.0).to_dense()[0, 0, row]
            assert bool(keep[2]) == expected, (rows, factor)


# --- What is kept in any case -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1, 3, 50])
@pytest.mark.parametrize("q_len", [700, 333])
@pytest.mark.parametrize(("start", "length"), [(0, 700), (131, 500), (64, 636), (0, 420)])
def test_always_kept(last: int, q_len: int, start: int, length: int) -> None:
    """The first block with a real key, a row's own positions, the last rows with a real query; nothing unseen."""
    query, key = absorbed_qk(q_len, 700, 64, start)
    config = PeakPrefillConfig(1e-6, last_full_blocks=last, block_size=64)
    found = select_blocks(query, key, config, starts=[start], lengths=[length])
    grid, end = Grid(q_len, 700, 64), start + length
    visible = visible_blocks(grid, found.ranges)[:, None]
    expected = torch.zeros(grid.q_blocks, grid.kv_blocks, dtype=torch.bool)
    real = [
        [p for p in range(grid.offset + i * 64, min(grid.offset + (i + 1) * 64, 700)) if start <= p < end]
        for i in range(grid.q_blocks)
    ]
    with_query = [i for i, positions in enumerate(real) if positions]
    for i in with_query:
        for p in range(grid.offset + i * 64, real[i][-1] + 1):
            expected[i, p // 64] = True
        expected[i, start // 64] = True
        if i in with_query[max(0, len(with_query) - last) :]:
            expected[i] = True
    assert torch.equal(found.to_dense(), (expected & visible).expand_as(found.to_dense()))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("last", [0, 1, 3])
def test_dense_up_to_the_documented_length(last: int, block_size: int) -> None:
    """Exactly: one token more, and there is a block that its shares alone decide."""
    config = PeakPrefillConfig(last_full_blocks=last, block_size=block_size)
    limit = config.dense_tokens
    assert limit == (2 + last) * block_size
    query, key = absorbed_qk(limit + 1, limit + 1, block_size)
    assert (select_blocks(query[:, :, :limit], key[:, :, :limit], config).density() == 1).all()
    assert (select_blocks(query, key, config).density() < 1).all()


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": 0}, "peak must be in (0, 1), got 0"),
        ({"peak": 1}, "peak must be in (0, 1), got 1"),
        ({"peak": -0.2}, "peak must be in (0, 1), got -0.2"),
        ({"peak": 1.5}, "peak must be in (0, 1), got 1.5"),
        ({"peak": float("nan")}, "peak must be in (0, 1), got nan"),
        ({"peak": float("inf")}, "peak must be in (0, 1), got inf"),
        ({"peak": "0.2"}, "peak must be a number, got str '0.2'"),
        ({"peak": None}, "peak must be a number, got NoneType None"),
        ({"peak": True}, "peak must be a number, got bool True"),
        ({"representatives": "means"}, "representatives must be 'clusters' or 'outliers', got 'means'"),
        ({"representatives": None}, "representatives must be 'clusters' or 'outliers', got None"),
        ({"representatives": ["clusters"]}, "representatives must be 'clusters' or 'outliers', got ['clusters']"),
        ({"per_block": 0}, "per_block must be at least 1, got 0"),
        ({"per_block": 17}, "per_block must be at most 16, got 17"),
        ({"per_block": -1}, "per_block must be at least 1, got -1"),
        ({"per_block": 8.0}, "per_block must be an integer, got float 8.0"),
        ({"per_block": True}, "per_block must be an integer, got bool True"),
        ({"variance": 1}, "variance must be True or False, got 1"),
        ({"variance": None}, "variance must be True or False, got None"),
        ({"last_full_blocks": -1}, "last_full_blocks must be at least 0, got -1"),
        ({"last_full_blocks": 1.0}, "last_full_blocks must be an integer, got float 1.0"),
        ({"block_size": 32}, "block_size must be one of (64, 128), got 32"),
        ({"block_size": 128.0}, "block_size must be an integer, got float 128.0"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        PeakPrefillConfig(**arguments)


def test_limits_and_defaults() -> None:
    assert PeakPrefillConfig() == PeakPrefillConfig(0.2, "clusters", None, True, 1, 128)
    for config in (PeakPrefillConfig(1e-6, "outliers", 1, False, 0, 64), PeakPrefillConfig(0.999, "clusters", 16)):
        assert PeakPrefillConfig.from_settings(config.settings(), config.block_size) == config


@pytest.mark.parametrize("scale", [0, 0.0, -0.1, float("nan"), float("inf")])
def test_a_scale_must_be_positive(scale: float) -> None:
    query, key = blocky_qk(1, 1, 1, 300, 300, 16)
    with pytest.raises(ValueError, match=f"^scale must be a positive finite number, got {scale}$"):
        select_blocks(query, key, PeakPrefillConfig(), scale=scale)


def test_representatives_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 up to 65,536 positions, padding included, 4 from one more on."""
    assert [representatives.count_of(PeakPrefillConfig(), n) for n in (1, 65536, 65537, 10**6)] == [8, 8, 4, 4]
    assert {representatives.count_of(PeakPrefillConfig(per_block=3), n) for n in (1, 65536, 65537)} == {3}
    monkeypatch.setattr(representatives, "BY_LENGTH", (8, 4, 899))
    for n, taken in ((899, 8), (900, 4)):
        query, key = blocky_qk(1, 4, 2, n, n, 16)
        found = {
            r: kept(query, key, PeakPrefillConfig(0.3, per_block=r, block_size=64), starts=[140], lengths=[n - 200])
            for r in (None, 8, 4)
        }
        assert torch.equal(found[None], found[taken]) and not torch.equal(found[4], found[8])


# --- Keys at their limits ---------------------------------------------------------------------------------------------


def seen(key: Tensor, config: PeakPrefillConfig, start: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors and biases `[Hkv, nk, R(, D)]` for queries of ones and a scale of 1."""
    grid = Grid(key.shape[2], key.shape[2], config.block_size)
    found = element_of(torch.ones_like(key)[0], key[0], start, key.shape[2], grid, 1.0)
    assert found is not None
    return representatives.representatives(found[0], config)


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
@pytest.mark.parametrize("real", [1, 3, 8, 9])
def test_fewer_keys_than_representatives(kind: Any, real: int) -> None:
    """Each key stands for itself, and nothing stands for none."""
    _, key = blocky_qk(1, 1, 1, 200, 64 + real, 16)
    for start, block in ((0, 1), (64 - real, 0)):  # the last block, and the first
        vectors, biases = seen(key, PeakPrefillConfig(0.2, kind, 9, True, 0, 64), start)
        used = biases[0, block].isfinite()
        keys = key[0, 0, 64:] if block else key[0, 0, start:64]
        assert used.sum() == real and (biases[0, block][~used] == -torch.inf).all()
        assert (biases[0, block][used] == 0).all()  # one key each, without a spread
        distance = (vectors[0, block][used][:, None] - keys).norm(dim=-1)
        assert (distance.amin(0) < 1e-6).all() and (distance.amin(1) < 1e-6).all()


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_keys(kind: Any, value: float, dtype: torch.dtype) -> None:
    """One cluster for all of them; all scores equal, no NaN."""
    key = torch.full((1, 1, 500, 16), value, dtype=dtype)
    vectors, biases = seen(key, PeakPrefillConfig(0.2, kind, 8, True, 0, 64))
    assert not vectors.isnan().any() and not biases.isnan().any()
    if kind == "clusters":
        assert (biases[0, :7, 1:] == -torch.inf).all() and biases[0, :7, 0].allclose(torch.tensor(64.0).log())
        assert biases[0, 7, 0].allclose(torch.tensor(52.0).log()) and vectors[0, :, 0].allclose(key[0, 0, 0])
    else:  # seven alone, and the others
        assert biases[0, :7].exp().sum(-1).allclose(torch.tensor(64.0))
    query = blocky_qk(1, 2, 1, 500, 500, 16)[0].to(dtype)
    config = PeakPrefillConfig(0.25, kind, 8, True, 0, 64)
    counts = compare(select_blocks(query, key, config), ask_oracle(query, key, config), dtype)
    assert 0 < counts.kept < counts.decided and (value or counts.near == 0)


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
@pytest.mark.parametrize("values", [2, 3, 5])
def test_a_few_different_keys(kind: Any, values: int) -> None:
    """Fewer different keys than representatives: clusters hold one value each, so their scores are exact."""
    generator = torch.Generator().manual_seed(values)
    few = torch.randn(values, 16, generator=generator)
    key = few[torch.randint(values, (640,), generator=generator)][None, None]
    query = torch.randn(1, 2, 640, 16, generator=generator) * 5
    config = PeakPrefillConfig(0.2, kind, 8, True, 0, 64)
    if kind == "clusters":
        vectors, biases = seen(key, config)
        assert (biases.isfinite().sum(-1) == values).all() and biases.exp().sum(-1).allclose(torch.tensor(64.0))
        apart = (vectors[biases.isfinite()][:, None] - few).norm(dim=-1)
        assert apart.amin(-1).max() < 1e-5
    compare(select_blocks(query, key, config), ask_oracle(query, key, config), torch.float32)


def test_keys_far_from_zero() -> None:
    """A large common part changes no distance, and no share: the selection stays but for the rounding of scores."""
    query, key = structured_qk(1, 2, 1, 900, 900, 32, seed=4)
    config = PeakPrefillConfig(last_full_blocks=0, block_size=64)
    query[..., 5] = 0.0
    expected = kept(query, key, config)
    key[..., 5] += 100.0
    assert (kept(query, key, config) != expected).float().mean() < 0.01 < expected.float().mean() < 0.5
