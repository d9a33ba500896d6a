"""Mean correction on a GPU against its definition: the kernel, and the whole call by either backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import causal_oracle, relative_error
from oracle_mean_correction import KINDS, WINDOW, by_masked_scores, corrected_by_kernel, opposed
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import BlockSelection, FlashPrefillConfig, block_sparse_attention, select_blocks
from flexprefill_fa.backends import flash_problem
from flexprefill_fa.mean_correction import MeanCorrection


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_on_the_gpu(dtype: torch.dtype, head_dim: int, padded: bool, kind: MeanCorrection) -> None:
    query, key, value, selection = on_the_gpu(dtype, head_dim, padded)
    expected, real = by_masked_scores(query, key, value, selection, kind)
    got = corrected_by_kernel(query, key, value, selection, kind)
    assert torch.isfinite(got).all()
    plain, _, _ = causal_oracle(query, key, value, selection)
    allowed = 1e-4 if dtype == torch.float32 else 5e-3
    assert relative_error(got, expected, real) < allowed < relative_error(plain, expected, real) / 2


def on_the_gpu(dtype: torch.dtype, head_dim: int, padded: bool) -> tuple[Tensor, Tensor, Tensor, BlockSelection]:
    n = 5001  # 40 blocks: more than a tile of means
    query, key = (
        x.to("cuda", dtype) for x in structured_qk(2, 4, 2, 1000 if padded else n, n, head_dim, seed=head_dim)
    )
    place: dict[str, Any] = {"starts": [0, 300], "lengths": [n, n - 401]} if padded else {}
    selection = select_blocks(query, key, FlashPrefillConfig(alpha=0.3, window_blocks=1, last_full_blocks=0), **place)
    assert selection.density().mean() < 0.9
    return query, key, torch.randn_like(key), selection


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["TRITON", "FLASH"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_correction_on_the_gpu(
    dtype: torch.dtype, head_dim: int, padded: bool, backend: str, kind: MeanCorrection
) -> None:
    """The whole call: a wrong log-sum-exp from either kernel would show."""
    query, key, value, selection = on_the_gpu(dtype, head_dim, padded)
    if backend == "FLASH" and (problem := flash_problem(query, 128)):
        pytest.skip(problem)
    expected, real = by_masked_scores(query, key, value, selection, kind)
    out = block_sparse_attention(query, key, value, selection, mean_correction=kind, backend=backend)
    plain = block_sparse_attention(query, key, value, selection, backend=backend)
    assert relative_error(out, expected, real) < 5e-3 < relative_error(plain, expected, real) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dropped_blocks_that_outweigh_all_kept_ones_on_the_gpu(dtype: torch.dtype) -> None:
    query, key = (x.to("cuda", dtype) for x in opposed(1000, 64, last=500))
    value = torch.randn_like(key)
    selection = select_blocks(query, key, WINDOW)
    expected, real = by_masked_scores(query, key, value, selection)
    got = corrected_by_kernel(query, key, value, selection)
    # At scores of some 60 the rounding of the mean keys shows: 2 ** -9 of it moves a weight by a tenth.
    assert relative_error(got, expected, real) < {torch.float32: 1e-3, torch.float16: 2e-2}.get(dtype, 0.15)
