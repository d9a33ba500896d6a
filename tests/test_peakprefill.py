"""PeakPrefill's rule in plain PyTorch against the brute-force oracle: blocks, representatives and shares."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle_peakprefill
import pytest
import torch
from comparison_peakprefill import NEAR_TIE, Counts, ask_oracle, compare
from torch import Tensor
from workloads import blocky_qk, needle_qk, random_qk, structured_qk

from flexprefill_fa import PeakPrefillConfig, select_blocks
from flexprefill_fa.grid import Grid
from flexprefill_fa.masks.element import Element, element_of
from flexprefill_fa.masks.peakprefill import reference, representatives

pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens; (first real key, real keys) of each batch element."""

    q_len: int
    kv_len: int
    heads: int = 2
    kv_heads: int = 1
    dim: int = 32
    padding: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    dtype: torch.dtype = FP32


SHAPES = {
    "one token": Shape(1, 1),
    "127": Shape(127, 127),
    "129": Shape(129, 129, heads=3),
    "300": Shape(300, 300, dim=80),
    "whole blocks": Shape(1024, 1024),
    "odd": Shape(1001, 1001, heads=4, kv_heads=2),
    "chunk, aligned": Shape(512, 1024),
    "chunk, odd offset": Shape(500, 1133),
    "chunk of 127": Shape(127, 1100),
    "chunk of 129": Shape(129, 1100),
    "one query": Shape(1, 900, heads=4, kv_heads=4),
    "left padding": Shape(700, 700, padding=((0, 700), (131, 569), (128, 572), (640, 60))),
    "right padding": Shape(700, 700, padding=((0, 700), (0, 569), (0, 640), (0, 1))),
    "both paddings": Shape(900, 900, padding=((3, 800), (200, 600), (64, 836), (700, 100))),
    "padded chunk": Shape(400, 900, padding=((0, 900), (77, 823), (550, 350), (10, 690))),
    "queries all padded": Shape(200, 900, padding=((0, 680), (0, 700), (0, 701), (699, 2))),
    "small scale": Shape(700, 700, scale=0.02),
    "large scale": Shape(700, 700, scale=0.9),
    "bf16": Shape(700, 700, dtype=BF16),
    "bf16, padded": Shape(700, 700, padding=((0, 700), (300, 400)), dtype=BF16),
    "fp16, padded": Shape(700, 700, padding=((0, 700), (300, 400)), dtype=FP16),
}
# peak, representatives, per_block, variance, last_full_blocks, block_size
SETTINGS = [
    (0.2, "clusters", None, True, 0, 64),
    (0.3, "outliers", 8, True, 0, 64),
    (0.1, "clusters", 3, False, 1, 128),
    (0.4, "clusters", 16, True, 0, 64),
    (0.25, "outliers", 3, False, 3, 64),
    (0.3, "clusters", 1, True, 0, 128),
    (0.2, "outliers", 16, True, 0, 128),
    (0.5, "clusters", 8, False, 0, 64),
    (0.05, "outliers", 1, True, 0, 64),
]


def poison(query: Tensor, key: Tensor, shape: Shape) -> None:
    """NaN and infinities where the tokens are padding."""
    offset = shape.kv_len - shape.q_len
    for b, (start, length) in enumerate(shape.padding or ()):
        for tensor, first in ((query, offset), (key, 0)):
            tensor[b, :, : max(0, start - first)] = torch.nan
            tensor[b, :, max(0, start + length - first) :] = torch.inf if b % 2 else -torch.inf


@pytest.mark.parametrize("make", [structured_qk, needle_qk])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_oracle(name: str, make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    shape, counts = SHAPES[name], Counts()
    starts, lengths = zip(*shape.padding, strict=True) if shape.padding else (None, None)
    first = list(SHAPES).index(name) + (4 if make is needle_qk else 0)
    for seed in range(2 if shape.padding else 3):
        config = PeakPrefillConfig(*SETTINGS[(first + seed) % len(SETTINGS)])  # pyright: ignore[reportArgumentType]
        batch = len(shape.padding or [0])
        query, key = make(batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.dim, seed=seed)
        query, key = query.to(shape.dtype), key.to(shape.dtype)
        poison(query, key, shape)
        place: dict[str, Any] = {"starts": starts, "lengths": lengths, "scale": shape.scale}
        selection = select_blocks(query, key, config, **place)
        counts.add(compare(selection, ask_oracle(query, key, config, **place), shape.dtype, (config, name)))
        again = select_blocks(query, key, config, **place)
        assert all(torch.equal(a, b) for a, b in zip(selection.lists, again.lists, strict=True))
    most = 0.01 if shape.dtype is FP32 else 0.05
    assert counts.near <= most * counts.decided, f"{counts}: the comparison says too little"


def test_inputs_leave_the_decision_to_the_scores() -> None:
    """The inputs above mean something: of the cells that X decides, many are kept and many dropped."""
    for make, peak in ((structured_qk, 0.2), (needle_qk, 0.2), (blocky_qk, 0.4), (random_qk, 0.1)):
        query, key = make(1, 4, 2, 1001, 1001, 32, seed=5)
        config = PeakPrefillConfig(peak, last_full_blocks=0, block_size=64)
        counts = compare(select_blocks(query, key, config), ask_oracle(query, key, config), FP32)
        assert 0.1 * counts.decided < counts.kept < 0.9 * counts.decided, (make, counts)


def element(query: Tensor, key: Tensor, block_size: int, start: int = 0, end: int | None = None) -> Element:
    grid = Grid(query.shape[2], key.shape[2], block_size)
    end = grid.kv_len if end is None else end
    found = element_of(query[0], key[0], start, end, grid, query.shape[-1] ** -0.5)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
@pytest.mark.parametrize("per_block", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_representatives_and_shares(kind: Any, per_block: int, dtype: torch.dtype) -> None:
    """Vectors, biases and X themselves, of blocks with 5 and 37 real keys too."""
    query, key = (x.to(dtype) for x in structured_qk(1, 4, 2, 600, 677, 24, seed=per_block))
    place = element(query, key, 64, 59, 677)
    config = PeakPrefillConfig(0.2, kind, per_block, last_full_blocks=0, block_size=64)
    vectors, biases = representatives.representatives(place, config)
    assert vectors.dtype == dtype and vectors.shape == (2, 11, per_block, 24)
    unclear = 0
    for head, block in itertools.product(range(2), range(11)):
        keys = key[0, head, max(block * 64, 59) : (block + 1) * 64].double()
        expected = oracle_peakprefill.represent(keys.numpy(), kind, per_block)
        if expected.gap < oracle_peakprefill.CLUSTER_TIE:
            unclear += 1
            continue
        squares = query[0, 2 * head : 2 * head + 2].double()[:, 599 % 16 :: 16].square().mean((0, 1))
        bias = torch.from_numpy(expected.weights).log() + torch.from_numpy(expected.variances) @ squares / 48
        means, found, adds = (
            torch.from_numpy(expected.means),
            vectors[head, block].double(),
            biases[head, block].double(),
        )
        if kind == "outliers":  # which comes first does not matter
            mine, theirs = found[:, 0].argsort(), means[:, 0].argsort()
            found, adds, means, bias = found[mine], adds[mine], means[theirs], bias[theirs]
        torch.testing.assert_close(adds, bias, atol=1e-4, rtol=0)
        assert (found - means).abs().max() <= (1e-6 if dtype is FP32 else 2**-8) * (1 + means.abs().max())
        assert adds.isfinite().sum() == min(per_block, len(keys))
    assert unclear <= 2
    oracle = ask_oracle(query, key, config, [59], [618])
    peaks = reference.peak_shares(place, config)[:, :, 1:].double()
    clear = torch.from_numpy(oracle.margin[0, :, :, 1:]) >= NEAR_TIE[dtype]
    exact = torch.from_numpy(oracle.peaks[0, :, :, 1:])
    torch.testing.assert_close(peaks[clear], exact[clear], rtol=1e-4 if dtype is FP32 else 0.1, atol=1e-7)


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
@pytest.mark.parametrize("sharpness", [1e-4, 0.1, 30.0, 2000.0])
def test_flat_and_peaked_scores(kind: Any, sharpness: float) -> None:
    """Nearly equal scores, and scores of some 10,000, of which fp32 holds no more than the thousandth part."""
    counts = Counts()
    for peak in (0.05, 0.3, 0.9):
        query, key = random_qk(1, 4, 2, 600, 600, 32, sharpness=sharpness, seed=int(100 * peak))
        config = PeakPrefillConfig(peak, kind, 8, last_full_blocks=0, block_size=64)
        counts.add(compare(select_blocks(query, key, config), ask_oracle(query, key, config), FP32, config))
    assert counts.kept < counts.decided and counts.near <= (0.01 if sharpness < 100 else 0.1) * counts.decided, counts
    if sharpness == 2000.0:
        scores = query[0, 0] @ key[0, 0].mT / 32**0.5
        assert 8000 < scores.abs().max() < 20000


@pytest.mark.parametrize("peak", [1e-3, 1e-9, 1e-12])
def test_small_peaks(peak: float) -> None:
    query, key = structured_qk(1, 2, 1, 700, 700, 32, seed=3)
    config = PeakPrefillConfig(peak, last_full_blocks=0, block_size=64)
    counts = compare(select_blocks(8 * query, key, config), ask_oracle(8 * query, key, config), FP32)
    assert 0 < counts.kept < counts.decided


def test_the_scores_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = needle_qk(1, 4, 2, 900, 1100, 32)
    config = PeakPrefillConfig(block_size=64)
    whole = select_blocks(query, key, config).to_dense()
    monkeypatch.setattr("flexprefill_fa.masks.element.SCORE_BYTES", 1)
    assert torch.equal(select_blocks(query, key, config).to_dense(), whole)


@pytest.mark.parametrize("kind", ["clusters", "outliers"])
def test_ties_go_to_the_lower_position(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of 0, 1 and -1 at many equal distances, all exact in fp32 without rounds of moving: no tie is excused."""
    monkeypatch.setattr(representatives, "CLUSTER_STEPS", 0)
    monkeypatch.setattr(oracle_peakprefill, "ROUNDS", 0)
    generator = torch.Generator().manual_seed(1)
    ties = 0
    for per_block in (2, 3, 5, 8, 16):
        query = torch.randn(1, 2, 512, 16, generator=generator) * 6
        half = torch.randint(-1, 2, (1, 1, 512, 16), generator=generator).float()
        half[..., 3:] = 0
        key = half.view(1, 1, 8, 64, 16)
        key[:, :, :, 32:] = -key[:, :, :, :32]  # their mean is 0
        key = key.view(1, 1, 512, 16)
        place, config = element(query, key, 64), PeakPrefillConfig(0.2, kind, per_block, True, 0, 64)
        vectors, _ = representatives.representatives(place, config)
        for block in range(8):
            expected = oracle_peakprefill.represent(
                key[0, 0, block * 64 : block * 64 + 64].double().numpy(), kind, per_block
            )
            ties += expected.gap == 0
            found, means = vectors[0, block].double(), torch.from_numpy(expected.means)
            if kind == "outliers":
                found, means = (x[torch.from_numpy(_lexical(x))] for x in (found, means))
            torch.testing.assert_close(found, means, atol=1e-6, rtol=0)
    assert ties > 20


def _lexical(vectors: Tensor) -> np.ndarray:
    return np.lexsort(vectors.numpy().T)
