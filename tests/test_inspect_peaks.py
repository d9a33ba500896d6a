"""What the page of `flexprefill inspect` says of PeakPrefill's blocks: by which row, and which representative."""

from __future__ import annotations

import base64
import re
import zlib
from typing import Any

import pytest
import torch
from inspect_pages import read_data
from torch import Tensor

from flexprefill_fa import FlexPrefillConfig, PeakPrefillConfig
from flexprefill_fa.grid import Grid
from flexprefill_fa.integrations.transformers import SparseCall, enable_sparse_prefill, observe_sparse_prefill
from flexprefill_fa.masks.element import element_of
from flexprefill_fa.masks.peakprefill.representatives import representatives
from flexprefill_fa.tools.inspection import collect
from flexprefill_fa.tools.inspection.collect import inspect_prefill
from flexprefill_fa.tools.inspection.page import render
from flexprefill_fa.tools.inspection.peaks import block_peaks
from flexprefill_fa.tools.progress import WorkProgress

CONFIG = PeakPrefillConfig(per_block=3)


def read_peaks(page: str, layer: int, heads: int, blocks: int) -> Tensor:
    """uint8 `[heads, 2, nb, nb]`, zeros above the diagonal."""
    (found,) = re.findall(rf'<script type="text/plain" id="peaks-{layer}">(.*?)</script>', page)
    values = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(found))), dtype=torch.uint8)
    peaks = torch.zeros(heads, 2, blocks, blocks, dtype=torch.uint8)
    row, column = torch.tril_indices(blocks, blocks)
    peaks[:, :, row, column] = values.view(heads, 2, -1)
    return peaks


def by_hand(query: Tensor, key: Tensor, config: PeakPrefillConfig, scale: float) -> Tensor:
    """The same, one query at a time."""
    (heads, length, _), size = query.shape, config.block_size
    found = element_of(query, key, 0, length, Grid(length, length, size), scale)
    assert found is not None
    vectors, bias = representatives(found[0], config)
    blocks = -(-length // size)
    best = torch.full((heads, blocks, blocks), -torch.inf)
    peaks = torch.zeros(heads, 2, blocks, blocks, dtype=torch.uint8)
    for head in range(heads):
        kv = head // (heads // len(key))
        for place in range(length):
            own, scores, numbers = place // size, [], []
            for block in range(own + 1):
                exact = (key[kv, block * size : min((block + 1) * size, place + 1)] @ query[head, place]) * scale
                seen = vectors[kv, block] @ query[head, place] * scale + bias[kv, block]
                by_keys = block in (0, own)
                scores.append(exact.logsumexp(0) if by_keys else seen.max())
                numbers.append(0 if by_keys else int(seen.argmax()) + 1)
            shares = torch.stack(scores).softmax(0)
            for block, (share, number) in enumerate(zip(shares, numbers, strict=True)):
                if share > best[head, own, block]:
                    best[head, own, block] = share
                    peaks[head, :, own, block] = torch.tensor([place % size, number])
    return peaks


@pytest.mark.parametrize("length", [257, 400])
def test_by_hand(length: int) -> None:
    torch.manual_seed(length)
    config = PeakPrefillConfig(per_block=3, block_size=64)
    query, key = 3 * torch.randn(4, length, 16), torch.randn(2, length, 16)
    found = block_peaks(query, key, config, 0.25)
    wanted = by_hand(query, key, config, 0.25)
    causal = torch.ones(wanted.shape[-2:], dtype=torch.bool).tril()
    assert torch.equal(found.row[:, causal], wanted[:, 0, causal].long())
    assert torch.equal(found.representative[:, causal], wanted[:, 1, causal].long())


def test_the_row_that_looks_for_one_key() -> None:
    """With the keys farthest from a block's mean as representatives, in that order after the mean of the rest."""
    torch.manual_seed(0)
    key, query = 0.1 * torch.randn(1, 640, 32), 0.1 * torch.randn(1, 640, 32)
    key[0, 200] += 8 * torch.nn.functional.one_hot(torch.tensor(3), 32)
    key[0, 230] += 6 * torch.nn.functional.one_hot(torch.tensor(7), 32)
    query[0, 512 + 77] = 5 * key[0, 230]
    config = PeakPrefillConfig(representatives="outliers", per_block=4)
    found = block_peaks(query, key, config, 32**-0.5)
    assert (found.row[0, 4, 1], found.representative[0, 4, 1]) == (77, 3)
    query[0, 512 + 77] = 0
    query[0, 512 + 5] = 5 * key[0, 200]
    found = block_peaks(query, key, config, 32**-0.5)
    assert (found.row[0, 4, 1], found.representative[0, 4, 1]) == (5, 2)


def test_the_page(needle_model: Any) -> None:
    """Its bytes are of the calls that ran; other selectors have none."""
    ids = torch.randint(1, 2000, (1, 1200), generator=torch.Generator().manual_seed(0))
    calls: list[SparseCall] = []
    with (
        enable_sparse_prefill(needle_model, CONFIG),
        observe_sparse_prefill(needle_model, calls.append),
        torch.no_grad(),
    ):
        needle_model(ids)
    page = render(inspect_prefill(needle_model, ids, CONFIG, WorkProgress()), {})
    assert all(layer["peaks"] for layer in read_data(page)["layers"])
    for call in calls:
        found = block_peaks(call.query[0], call.key[0], CONFIG, call.scale)
        peaks = read_peaks(page, call.layer, 8, 10).long()
        assert torch.equal(peaks[:, 0], found.row.tril()) and torch.equal(peaks[:, 1], found.representative.tril())
        assert peaks[:, 1].max() == 3 and (peaks[:, 1].diagonal(dim1=1, dim2=2) == 0).all()
    other = FlexPrefillConfig(gamma=0.5, min_budget=128)
    without = render(inspect_prefill(needle_model, ids, other, WorkProgress()), {})
    assert not any(layer["peaks"] for layer in read_data(without)["layers"]) and 'id="peaks-' not in without


def test_cells_of_several_blocks_have_none(needle_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAP_BYTES", 6 * 8 * 5 * 30 * 4 / 3)  # for 7 cells a side, of 10 blocks
    ids = torch.randint(1, 2000, (1, 1200), generator=torch.Generator().manual_seed(0))
    found = inspect_prefill(needle_model, ids, CONFIG, WorkProgress())
    assert {maps.group for maps in found.maps.values()} == {2} and found.peaks == {}
