"""The choice between dense and sparse: sane everywhere, and true to the rows that it was fitted to."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench import RESULTS
from bench.gpu_constants import best_dense, best_tiles
from flexprefill_fa import FlexPrefillConfig, PeakPrefillConfig, get_selector
from flexprefill_fa.backends import TRITON_TILES
from flexprefill_fa.cost_model import RATES, predicted_ms, prefers_dense
from flexprefill_fa.tools.rows import Row, read

LENGTHS = (1, 129, 1000, 2048, 4096, 5000, 16384, 131072, 1_000_000)
WITHIN = 0.25  # of a measured time
CLOSE = 0.05  # either decision is right


def measured(capability: tuple[int, int], selector: str, head_dim: int) -> list[Row]:
    """Rows of the fitted series of one capability, dense and of one selector with its defaults.

    Of the GPU on which "auto" was measured with it: times of several are not compared.
    """
    rows = [
        row
        for row in read(RESULTS / "attention.jsonl")
        if row.get("capability") == list(capability)
        and row["head_dim"] == head_dim
        and row["workload"] == "sharpened"
        and row["selector"] in (None, selector)
        and (row["selector"] is None or row["settings"] == dataclasses.asdict(get_selector(selector)()))
        and row["length"] <= 65536
    ]
    gpus = {row["gpu"] for row in rows if row["backend"] == "auto"}
    return [row for row in rows if row["gpu"] in gpus]


def test_expected_density_falls_with_the_length_and_respects_the_budgets() -> None:
    for config in (
        FlexPrefillConfig(),
        FlexPrefillConfig(min_budget=8192),
        FlexPrefillConfig(gamma=0.5),
        FlexPrefillConfig(max_budget=1024),
    ):
        densities = [config.expected_density(tokens) for tokens in LENGTHS]
        assert all(0 < density <= 1 for density in densities)
        assert densities == sorted(densities, reverse=True)
    assert FlexPrefillConfig(gamma=1.0).expected_density(100_000) == 1.0
    assert FlexPrefillConfig(gamma=0.5).expected_density(8192) < FlexPrefillConfig().expected_density(8192)
    assert FlexPrefillConfig(max_budget=1024).expected_density(8192) < FlexPrefillConfig().expected_density(8192)
    blocks, always = 128, 2 * 16
    kept = sum(min(row + 1, always) for row in range(blocks))
    expected = kept / (blocks * (blocks + 1) / 2)
    assert math.isclose(FlexPrefillConfig(min_budget=2048).expected_density(blocks * 128), max(expected, 0.34))


def test_a_lower_peak_is_expected_to_keep_more() -> None:
    densities = [PeakPrefillConfig().expected_density(tokens) for tokens in LENGTHS]
    assert densities == sorted(densities, reverse=True) and all(0 < density <= 1 for density in densities)
    assert PeakPrefillConfig(peak=0.05).expected_density(16384) == pytest.approx(0.2)
    assert PeakPrefillConfig(peak=0.001).expected_density(4096) == 1.0


def test_nothing_is_predicted_where_nothing_was_measured() -> None:
    config = FlexPrefillConfig(min_budget=256)
    query = torch.empty(1, 4, config.dense_tokens, 64)
    assert prefers_dense(query, query, config, "CPU")
    query = torch.empty(1, 4, config.dense_tokens + 1, 64)
    assert not prefers_dense(query, query, config, "CPU")


@pytest.mark.parametrize("where", RATES, ids=str)
def test_the_model_is_true_to_its_rows(where: tuple[tuple[int, int], str, str, int]) -> None:
    capability, selector, backend, head_dim = where
    rows = measured(capability, selector, head_dim)
    dense_rows = best_dense(rows, backend)
    sparse_rows = {row["length"]: row for row in rows if row["path"] == "sparse" and row["backend"] == backend}
    lengths = sorted(set(dense_rows) & set(sparse_rows))
    assert len(lengths) >= 3, f"no rows for {where}"
    for length in lengths:
        shape = {"batch": 1, "heads": sparse_rows[length]["heads"], "head_dim": head_dim, "tokens": length}
        dense_ms, sparse_ms = dense_rows[length]["total_ms"], sparse_rows[length]["total_ms"]
        dense, sparse = predicted_ms(RATES[where], **shape, density=sparse_rows[length]["density"])
        assert abs(dense - dense_ms) <= WITHIN * dense_ms, (length, dense, dense_ms)
        assert abs(sparse - sparse_ms) <= WITHIN * sparse_ms, (length, sparse, sparse_ms)
        usual = get_selector(selector)().expected_density(length)
        dense, sparse = predicted_ms(RATES[where], **shape, density=usual)
        if abs(dense_ms - sparse_ms) > CLOSE * dense_ms:
            assert (dense <= sparse) == (dense_ms <= sparse_ms), (length, dense, sparse, dense_ms, sparse_ms)


def test_every_tile_is_the_fastest_that_was_measured() -> None:
    best = best_tiles(read(RESULTS / "tuning.jsonl"))
    assert set(TRITON_TILES) <= set(best)
    for where, tile in TRITON_TILES.items():
        assert best[where] == tile, where


@pytest.mark.parametrize("where", RATES, ids=str)
def test_auto_is_never_much_slower_than_the_best_dense_kernel(where: tuple[tuple[int, int], str, str, int]) -> None:
    capability, selector, _, head_dim = where
    rows = [row for row in measured(capability, selector, head_dim) if row["backend"] == "auto"]
    assert {row["path"] for row in rows} == {"dense", "sparse"}
    for row in rows:
        # Shorter prompts take SDPA: its launch costs the CPU less than its kernel costs the GPU more.
        assert row["speedup_best_dense"] >= 0.97 or row["length"] < 2048, row["length"]
