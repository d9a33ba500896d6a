"""Mean correction against its definition, in fp64: by FlexAttention on the CPU, and in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import needs
import pytest
import torch
from oracle import relative_error
from oracle_mean_correction import (
    CASES,
    KINDS,
    SMALL,
    WINDOW,
    by_definition,
    by_masked_scores,
    corrected_by_kernel,
    make,
    opposed,
)
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import (
    FlexPrefillConfig,
    block_sparse_attention,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.validation import check_mean_correction

HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
@needs.mean_correction
def test_on_the_cpu_it_is_what_the_definition_says(case: tuple, kind: MeanCorrection) -> None:
    query, key, value, selection = make(case)
    expected = by_definition(query, key, value, selection, 32**-0.5, kind)
    out = block_sparse_attention(query, key, value, selection, mean_correction=kind)
    real = (expected != 0).any(-1, keepdim=True)
    assert relative_error(out, expected, real) < 1e-5
    plain = block_sparse_attention(query, key, value, selection)
    assert relative_error(plain, expected, real) > 1e-2


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see test_gpu_mean_correction.py")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
def test_the_kernel_is_what_the_definition_says(case: tuple, kind: MeanCorrection) -> None:
    query, key, value, selection = make(case)
    scale = 32**-0.5
    got = corrected_by_kernel(query, key, value, selection, kind)
    expected = by_definition(query, key, value, selection, scale, kind)
    real = (expected != 0).any(-1, keepdim=True)
    assert torch.isfinite(got).all()
    assert relative_error(got, expected, real) < 1e-5


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see test_gpu_mean_correction.py")
def test_the_kernel_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and index chunks so small that each of them has a second one."""
    from flexprefill_fa.kernels import mean_correction as kernel

    monkeypatch.setattr(kernel, "launch_options", lambda *_: {"ROWS": 64, "COLUMNS": 16, "STAGES": 1, "num_warps": 4})
    monkeypatch.setattr("flexprefill_fa.kernels.kept_map.CHUNK", 4)
    query, key = structured_qk(1, 2, 1, 140, 3300, 32, seed=7)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, SMALL)
    assert (selection.kv_num_blocks + selection.full_kv_num_blocks).max() > 4  # an index chunk
    got = corrected_by_kernel(query, key, value, selection)
    assert relative_error(got, by_masked_scores(query, key, value, selection)[0], torch.ones(1)) < 1e-5
    query, key = opposed(700, 32, last=300)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, WINDOW)
    got = corrected_by_kernel(query, key, value, selection)
    assert relative_error(got, by_masked_scores(query, key, value, selection)[0], torch.ones(1)) < 1e-5


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see test_gpu_mean_correction.py")
def test_the_kernel_reads_nothing_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, selection = make(CASES[2])
    expected = corrected_by_kernel(query, key, value, selection)
    clean, clean_like = torch.empty, torch.empty_like

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(clean(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(clean_like(*a, **k)))
    assert torch.equal(corrected_by_kernel(query, key, value, selection), expected)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see test_gpu_mean_correction.py")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_rows_that_keep_nothing(shift: float, kind: MeanCorrection) -> None:
    """Their means alone count, at whatever scores: an emptied row block has no norm to be relative to."""
    query, key = structured_qk(1, 2, 1, 400, 400, 32, seed=2)
    query[..., 0], key[..., 0] = 1.0, shift * 32**0.5
    value = torch.randn_like(key)
    selection = select_blocks(query, key, SMALL)
    selection.kv_num_blocks[:, :, 4] = selection.full_kv_num_blocks[:, :, 4] = 0
    expected = by_masked_scores(query, key, value, selection, kind)[0]
    assert relative_error(corrected_by_kernel(query, key, value, selection, kind), expected, torch.ones(1)) < 1e-4


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see test_gpu_mean_correction.py")
def test_dropped_blocks_that_outweigh_all_kept_ones() -> None:
    """Beyond the range of weights relative to the kept blocks' norm: what the second way through is for."""
    query, key = opposed(400, 32, last=200)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, WINDOW)
    got = corrected_by_kernel(query, key, value, selection)
    assert relative_error(got, by_definition(query, key, value, selection, 32**-0.5), torch.ones(1)) < 1e-5


@needs.mean_correction
def test_rows_that_drop_nothing_are_unchanged() -> None:
    query, key = structured_qk(1, 2, 1, 300, 300, 32, seed=1)
    value = torch.randn_like(key)
    everything = FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64)
    out = sparse_prefill_attention(query, key, value, everything, backend="CPU", mean_correction=True)
    plain = sparse_prefill_attention(query, key, value, everything, backend="CPU")
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 128])
@needs.mean_correction
def test_one_call_for_a_padded_batch(size: int, kind: MeanCorrection) -> None:
    config = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=64, block_size=size)
    query, key = structured_qk(2, 4, 2, 600, 600, 32, seed=5)
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [0, 70], "lengths": [600, 500]}
    out, selection = sparse_prefill_attention(
        query, key, value, config, mean_correction=kind, return_selection=True, backend="CPU", **place
    )
    expected, real = by_masked_scores(query, key, value, selection, kind)
    assert relative_error(out, expected, real) < 1e-5
    plain = sparse_prefill_attention(query, key, value, config, backend="CPU", **place)
    assert relative_error(plain, expected, real) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@needs.mean_correction
def test_padded_queries_may_be_anything(kind: MeanCorrection, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = structured_qk(1, 2, 1, 300, 300, 32, seed=4)
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [90], "lengths": [210], "mean_correction": kind}
    expected = sparse_prefill_attention(query, key, value, SMALL, **place)
    query[:, :, :90] = torch.nan
    out = sparse_prefill_attention(query, key, value, SMALL, **place)
    torch.testing.assert_close(out[:, :, 90:], expected[:, :, 90:])
    with torch.compiler.set_stance("force_eager"):
        out = sparse_prefill_attention(query, key, value, SMALL, **place)
    torch.testing.assert_close(out[:, :, 90:], expected[:, :, 90:], atol=1e-5, rtol=1e-4)


@needs.mean_correction
def test_more_than_one_block_of_means() -> None:
    query, key = structured_qk(1, 2, 1, 130, 5000, 32, seed=6)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, SMALL)
    out = block_sparse_attention(query, key, value, selection, mean_correction=True)
    assert relative_error(out, by_masked_scores(query, key, value, selection)[0], torch.ones(1)) < 1e-5


@needs.mean_correction
def test_one_call_selects_and_corrects() -> None:
    query, key, value, selection = make(CASES[0])
    out = sparse_prefill_attention(query, key, value, SMALL, mean_correction=True)
    expected = block_sparse_attention(query, key, value, selection, mean_correction=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    scaled = sparse_prefill_attention(query, key, value, SMALL, mean_correction=True, scale=0.5)
    kept = select_blocks(query, key, SMALL, scale=0.5)
    assert relative_error(scaled, by_definition(query, key, value, kept, 0.5), torch.ones(1)) < 1e-5


@needs.mean_correction
def test_it_lowers_the_error() -> None:
    """On heads whose dropped blocks hold a good part of the attention."""
    query, key = structured_qk(1, 4, 2, 700, 700, 32, seed=3)
    value = torch.randn_like(key) + 2.0 * torch.nn.functional.one_hot((torch.arange(700) // 100) % 32, 32)
    selection = select_blocks(query, key, dataclasses.replace(SMALL, gamma=0.3))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    plain, corrected = (
        relative_error(block_sparse_attention(query, key, value, selection, mean_correction=x), dense, torch.ones(1))
        for x in (False, True)
    )
    assert corrected < 0.8 * plain


def test_an_older_torch_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match=r"torch 2\.13 and newer, got torch 2\.11\.0"):
        check_mean_correction(True, None, None, torch.device("cpu"))
    check_mean_correction(False, None, None, torch.device("cpu"))
    check_mean_correction(True, None, None, torch.device("cuda:1"))


def test_what_it_cannot_be_combined_with() -> None:
    query, key, value, selection = make(CASES[0])

    def mod(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def score(score, b, h, q_idx, kv_idx):
        return score

    with pytest.raises(ValueError, match=r"cannot be combined with a mask_mod$"):
        sparse_prefill_attention(query, key, value, SMALL, mask_mod=mod, mean_correction=True)
    with pytest.raises(ValueError, match="cannot be combined with a mask_mod or a score_mod"):
        block_sparse_attention(query, key, value, selection, mask_mod=mod, score_mod=score, mean_correction=True)
    with pytest.raises(ValueError, match="mean_correction must be True, False or 'tilted', got 'yes'"):
        sparse_prefill_attention(query, key, value, SMALL, mean_correction="yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("kind", KINDS)
def test_masked_scores_are_the_definition(case: tuple, kind: MeanCorrection) -> None:
    query, key, value, selection = make(case)
    got, real = by_masked_scores(query, key, value, selection, kind)
    expected = by_definition(query, key, value, selection, 32**-0.5, kind)
    assert relative_error(got, expected, real) < 1e-9
