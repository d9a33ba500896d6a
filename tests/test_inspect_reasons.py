"""What `flexprefill inspect` knows of why blocks are kept: clauses, shares, their rows and representatives."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from inspect_pages import read_data
from torch import Tensor

from flexprefill_fa import (
    FlashPrefillConfig,
    FlexPrefillConfig,
    PeakPrefillConfig,
    Selector,
    select_blocks,
    share_heads,
)
from flexprefill_fa.grid import Grid
from flexprefill_fa.integrations.transformers import SparseCall, enable_sparse_prefill, observe_sparse_prefill
from flexprefill_fa.masks import selector as selector_module
from flexprefill_fa.masks.element import Element, element_of
from flexprefill_fa.masks.peakprefill.representatives import representatives
from flexprefill_fa.masks.shares import BlockShares
from flexprefill_fa.tools.inspection import collect
from flexprefill_fa.tools.inspection.collect import inspect_prefill
from flexprefill_fa.tools.inspection.page import render
from flexprefill_fa.tools.inspection.reasons import PARTS, Reasons, find_reasons, reason_maps, rule_words
from flexprefill_fa.tools.progress import WorkProgress

CONFIG = PeakPrefillConfig(per_block=3)


def element(query: Tensor, key: Tensor, size: int, scale: float) -> Element:
    found = element_of(query, key, 0, query.shape[1], Grid(query.shape[1], key.shape[1], size), scale)
    assert found is not None
    return found[0]


def block_shares(query: Tensor, key: Tensor, config: PeakPrefillConfig, scale: float) -> Any:
    return config.block_shares(element(query, key, config.block_size, scale))


def by_hand(query: Tensor, key: Tensor, config: PeakPrefillConfig, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, rows and representatives, one query at a time."""
    (heads, length, _), size = query.shape, config.block_size
    vectors, bias = representatives(element(query, key, size, scale), config)
    blocks = -(-length // size)
    best = torch.full((heads, blocks, blocks), -torch.inf)
    rows, numbers = torch.zeros(2, heads, blocks, blocks, dtype=torch.int64)
    for head in range(heads):
        kv = head // (heads // len(key))
        for place in range(length):
            own, scores, through = place // size, [], []
            for block in range(own + 1):
                exact = (key[kv, block * size : min((block + 1) * size, place + 1)] @ query[head, place]) * scale
                seen = vectors[kv, block] @ query[head, place] * scale + bias[kv, block]
                by_keys = block in (0, own)
                scores.append(exact.logsumexp(0) if by_keys else seen.max())
                through.append(0 if by_keys else int(seen.argmax()) + 1)
            shares = torch.stack(scores).softmax(0)
            for block, (share, number) in enumerate(zip(shares, through, strict=True)):
                if share > best[head, own, block]:
                    best[head, own, block] = share
                    rows[head, own, block], numbers[head, own, block] = place % size, number
    return best, rows, numbers


@pytest.mark.parametrize("length", [257, 400])
def test_by_hand(length: int) -> None:
    torch.manual_seed(length)
    config = PeakPrefillConfig(per_block=3, block_size=64)
    query, key = 3 * torch.randn(4, length, 16), torch.randn(2, length, 16)
    found = block_shares(query, key, config, 0.25)
    share, rows, numbers = by_hand(query, key, config, 0.25)
    causal = torch.ones(rows.shape[-2:], dtype=torch.bool).tril()
    torch.testing.assert_close(found.share[:, causal], share[:, causal])
    assert torch.equal(found.row[:, causal], rows[:, causal])
    assert torch.equal(found.representative[:, causal], numbers[:, causal])


def test_the_row_that_looks_for_one_key() -> None:
    """With the keys farthest from a block's mean as representatives, in that order after the mean of the rest."""
    torch.manual_seed(0)
    key, query = 0.1 * torch.randn(1, 640, 32), 0.1 * torch.randn(1, 640, 32)
    key[0, 200] += 8 * torch.nn.functional.one_hot(torch.tensor(3), 32)
    key[0, 230] += 6 * torch.nn.functional.one_hot(torch.tensor(7), 32)
    query[0, 512 + 77] = 5 * key[0, 230]
    config = PeakPrefillConfig(representatives="outliers", per_block=4)
    found = block_shares(query, key, config, 32**-0.5)
    assert (found.row[0, 4, 1], found.representative[0, 4, 1]) == (77, 3)
    query[0, 512 + 77] = 0
    query[0, 512 + 5] = 5 * key[0, 200]
    found = block_shares(query, key, config, 32**-0.5)
    assert (found.row[0, 4, 1], found.representative[0, 4, 1]) == (5, 2)


def read_reasons(page: str, layer: int, blocks: int) -> tuple[list[str], dict[str, Tensor]]:
    """The text of every causal block's clauses, and of each part `[heads, nb (nb + 1) / 2]`."""
    (found,) = re.findall(rf'<script type="text/plain" id="reasons-{layer}">(.*?)</script>', page)
    values = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(found))), dtype=torch.uint8).long()
    (about,) = [entry["reasons"] for entry in read_data(page)["layers"] if entry["layer"] == layer]
    size = blocks * (blocks + 1) // 2
    parts = values[size:].view(-1, len(about["parts"]), size).unbind(1) if about["parts"] else ()
    return [about["clauses"][which] for which in values[:size]], dict(zip(about["parts"], parts, strict=True))


def token_ids() -> Tensor:
    return torch.randint(1, 2000, (1, 1200), generator=torch.Generator().manual_seed(0))


def test_the_page(needle_model: Any) -> None:
    """Its bytes are of the calls that ran."""
    calls: list[SparseCall] = []
    with (
        enable_sparse_prefill(needle_model, CONFIG),
        observe_sparse_prefill(needle_model, calls.append),
        torch.no_grad(),
    ):
        needle_model(token_ids())
    page = render(inspect_prefill(needle_model, token_ids(), CONFIG, WorkProgress()), {})
    row, column = torch.tril_indices(10, 10)
    for call in calls:
        found = block_shares(call.query[0], call.key[0], CONFIG, call.scale)
        clauses, parts = read_reasons(page, call.layer, 10)
        assert tuple(parts) == PARTS
        assert torch.equal(parts["row"], found.row[:, row, column])
        assert torch.equal(parts["representative"], found.representative[:, row, column])
        assert parts["representative"].max() == 3
        level, share = 256 * parts["share"] + parts["share_fine"], found.share[:, row, column]
        assert (level % 32768 / 10000 - share).abs().max() < 6e-5 and torch.equal(level >= 32768, share >= CONFIG.peak)
        expected = [
            ", ".join(name for name, holds in (("first block", j == 0), ("own positions", i == j),
                                               ("last query blocks", i == 9)) if holds)
            for i, j in zip(row, column, strict=True)
        ]  # fmt: skip
        assert clauses == expected
        kept = call.selection.to_dense()[0][:, row, column]
        assert torch.equal(kept, (share >= CONFIG.peak) | torch.tensor([bool(text) for text in clauses]))
    about = read_data(page)["layers"][0]["reasons"]
    assert (about["what"], about["threshold"], about["least"]) == ("of one query's attention", "peak", 0.2)


@pytest.mark.parametrize(
    ("config", "parts", "clause"),
    [
        (FlexPrefillConfig(gamma=0.5, min_budget=128), set(), "own positions"),
        (FlashPrefillConfig(sink_blocks=1, window_blocks=2), {"share", "share_fine"}, "window"),
    ],
)
def test_other_selectors_say_what_they_can(needle_model: Any, config: Any, parts: set[str], clause: str) -> None:
    page = render(inspect_prefill(needle_model, token_ids(), config, WorkProgress()), {})
    clauses, found = read_reasons(page, 0, 10)
    assert set(found) == parts and {"", clause} <= set(clauses) and read_data(page)["rule"] == "the rule"


def test_cells_of_several_blocks_have_none(needle_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = 1 + 8 * (3 + len(PARTS))
    for cells, there in ((10, True), (7, False)):  # of 10 blocks
        monkeypatch.setattr(collect, "MAP_BYTES", 6 * maps * (cells * (cells + 1) / 2 + 1) * 4 / 3)
        found = inspect_prefill(needle_model, token_ids(), CONFIG, WorkProgress())
        assert {layer.group for layer in found.maps.values()} == {1 if there else 2}
        assert sorted(found.reasons) == (list(range(6)) if there else [])


def test_a_share_stays_on_its_side_of_the_threshold() -> None:
    row, column = torch.tril_indices(3, 3)
    near = torch.zeros(1, 3, 3)
    near[0, row, column] = torch.tensor([0.3, 0.3 - 1e-7, 0.3 + 1e-7, 1.0, 0.0, 1e-6])
    shares = BlockShares(near, "of something", "peak")
    config = PeakPrefillConfig(peak=0.3)
    found = reason_maps(Reasons({}, shares), config, 3)
    assert found.parts == ("share", "share_fine") and found.clauses == [""] and not any(found.data[:6])
    high, low = torch.tensor(list(found.data[6:])).view(2, 6)
    level = 256 * high + low
    assert level.tolist() == [32768 + 3000, 3000, 32768 + 3000, 32768 + 10000, 0, 0]


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test defines."""
    monkeypatch.setattr(selector_module, "_OPERATORS", dict(selector_module._OPERATORS))
    monkeypatch.setattr(selector_module, "_REGISTRY", dict(selector_module._REGISTRY))
    yield


def call_of(config: Any) -> SparseCall:
    query, key = torch.randn(1, 4, 700, 16), torch.randn(1, 2, 700, 16)
    return SparseCall(0, select_blocks(query, key, config, scale=0.25), query, key, 0.25, None)


@pytest.mark.usefixtures("forgotten")
def test_a_class_that_names_no_clauses() -> None:
    """What it keeps in any case beyond the usual has words all the same; of a pattern all is the rule."""

    @dataclass(frozen=True)
    class Third(Selector, name="third"):
        def keep(self, element: Element) -> Tensor:
            return torch.zeros(element.heads, *element.visible().shape, dtype=torch.bool)

        def always(self, element: Element) -> Tensor:
            blocks = torch.arange(element.grid.kv_blocks)
            return element.own_positions() | (blocks == 2)

    @dataclass(frozen=True)
    class Everything(Selector, name="everything"):
        def pattern(self, grid: Grid, ranges: Tensor) -> Tensor:
            return torch.ones(len(ranges), grid.q_blocks, grid.kv_blocks, dtype=torch.bool)

    found = find_reasons(call_of(Third()), Third())
    assert found.shares is None
    assert {name: blocks[5].nonzero()[:, 0].tolist() for name, blocks in found.clauses.items()} == {
        "first block": [], "own positions": [5], "kept in any case": [2],
    }  # fmt: skip
    maps = reason_maps(found, Third(), 6)
    assert set(maps.clauses) == {"", "own positions", "kept in any case", "first block, own positions"}
    assert maps.parts == ()
    assert find_reasons(call_of(Everything()), Everything()).clauses == {}


def test_the_rule_of_heads_that_share_a_choice() -> None:
    assert rule_words(share_heads(CONFIG)) == "the rule, for a head of its key head"
    assert rule_words(CONFIG) == "the rule"
