"""The parts of what a selector keeps whatever its rule says, and the shares that its rule compares with a threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_selector import define_documented, example, names
from torch import Tensor

from flexprefill_fa import FlashPrefillConfig, Selector, StreamingLLMConfig, select_blocks, share_heads
from flexprefill_fa.grid import Grid
from flexprefill_fa.masks.element import Element, element_of

PLACES = [(700, 700, 0, 700), (257, 700, 0, 700), (700, 700, 70, 690), (300, 650, 30, 650)]
"""Queries, keys, first and last real key."""


@pytest.fixture(scope="module", autouse=True)
def documented(tmp_path_factory: pytest.TempPathFactory) -> None:
    define_documented(tmp_path_factory.mktemp("selector"))


def inputs(place: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(place[1])
    key = torch.randn(1, 2, place[1], 16) + torch.randn(1, 2, 11, 16).repeat_interleave(64, 2)[:, :, : place[1]]
    return 3 * torch.randn(1, 4, place[0], 16), key


def element_in(place: tuple[int, int, int, int]) -> tuple[Element, slice, slice]:
    q_len, kv_len, start, end = place
    query, key = inputs(place)
    found = element_of(query[0], key[0], start, end, Grid(q_len, kv_len, 64), 0.25)
    assert found is not None
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", names())
def test_clauses_and_shares_say_what_is_kept(name: str, place: tuple[int, int, int, int]) -> None:
    config = example(name)
    element, rows, columns = element_in(place)
    starts, lengths = [place[2]], [place[3] - place[2]]
    selection = select_blocks(*inputs(place), config, starts=starts, lengths=lengths, scale=0.25)
    kept = selection.to_dense()[0, :, rows, columns]
    clauses = torch.zeros_like(kept)
    for blocks in config.clauses(element).values():
        clauses |= blocks & element.visible()
    assert not (clauses & ~kept).any() and clauses[:, :, 0].any() and clauses[:, -1, -1].all()
    shares = config.block_shares(element)
    if type(config).pattern is Selector.pattern:
        assert torch.equal(config.always(element) & element.visible(), clauses[0])
    if type(config).pattern is not Selector.pattern:
        assert shares is None and torch.equal(clauses, kept)
    elif name in ("peakprefill", "flashprefill"):
        assert shares is not None
        reached = (shares.share >= getattr(config, shares.threshold)) & element.visible()
        assert torch.equal(clauses | reached, kept)
        assert (reached & ~clauses).any() and not kept[:, element.visible()].all()
    else:
        assert shares is None


def test_the_clauses_of_each_selector() -> None:
    element, _, _ = element_in(PLACES[0])
    peak = example("peakprefill", last_full_blocks=2).clauses(element)
    assert peak["last query blocks"].nonzero()[:, 0].tolist() == [9, 10]
    assert peak["own positions"][5].nonzero()[:, 0].tolist() == [5]
    flash = FlashPrefillConfig(block_size=64, window_blocks=2).clauses(element)
    assert list(flash) == ["sink blocks", "window", "last query blocks"]
    assert flash["window"][5].nonzero()[:, 0].tolist()[:2] == [4, 5]
    stream = StreamingLLMConfig(sink=64, window=130, block_size=64).clauses(element)
    assert stream["sink"].nonzero()[:, -1].unique().tolist() == [0]
    assert stream["window"][6].nonzero()[:, 0].tolist()[:2] == [3, 4]  # from key 384 - 129 on


def test_a_query_block_that_sees_no_whole_block_has_finite_shares() -> None:
    element, _, _ = element_in((40, 40, 0, 40))
    shares = FlashPrefillConfig(block_size=64).block_shares(element)
    assert shares.share.isfinite().all()


def test_heads_that_share_a_choice_have_shares_of_their_own() -> None:
    element, _, _ = element_in(PLACES[0])
    config: Any = example("peakprefill")
    alone: Any = config.block_shares(element)
    together: Any = share_heads(config).block_shares(element)
    assert torch.equal(alone.share, together.share) and list(share_heads(config).clauses(element)) == list(
        config.clauses(element)
    )
