"""Unions and intersections of selections, and attention over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import relative_error
from oracle_attention import attention_probabilities
from torch import Tensor
from workloads import blocky_qk

from flexprefill_fa import (
    BlockSelection,
    FlashPrefillConfig,
    FlexPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    intersection,
    select_blocks,
    union,
)
from flexprefill_fa.attention import block_sparse_attention
from flexprefill_fa.block_mask import check_layout

FIRST, SECOND = StreamingLLMConfig(64, 100, 64), VerticalSlashConfig(130, 64, 64)
N = 500


def selections(**arguments: Any) -> tuple[Tensor, Tensor, BlockSelection, BlockSelection]:
    query, key = blocky_qk(2, 4, 2, N, N, 32)
    first, second = (select_blocks(query, key, config, **arguments) for config in (FIRST, SECOND))
    return query, key, first, second


@pytest.mark.parametrize("place", [{}, {"starts": [0, 130]}, {"lengths": [300, 500]}], ids=str)
def test_blocks_and_lists(place: dict[str, Any]) -> None:
    query, key, first, second = selections(**place)
    for compose, expected in (
        (union, first.to_dense() | second.to_dense()),
        (intersection, first.to_dense() & second.to_dense()),
    ):
        result = compose(first, second)
        check_layout(result)
        assert torch.equal(result.to_dense(), expected)
        assert torch.equal(result.kept_blocks(), expected.sum((-2, -1))), "no block in both lists"
        same = compose(first, first)
        for part in (slice(2), slice(2, 4)):
            (count, indices), (expected_count, expected_indices) = same.lists[part], first.lists[part]
            listed = torch.arange(indices.shape[-1]) < count[..., None]
            assert torch.equal(count, expected_count) and torch.equal(indices[listed], expected_indices[listed])
    assert not torch.equal(union(first, second).to_dense(), intersection(first, second).to_dense())
    flex = select_blocks(query, key, FlexPrefillConfig(0.5, min_budget=1, block_size=64), **place)
    assert union(flex, first).diagnostics is flex.diagnostics
    assert union(first, flex).diagnostics is first.diagnostics
    if "starts" in place:
        assert union(first, flex).starts is first.starts


def test_all_partial_stays_all_partial() -> None:
    query, key, first, second = selections(all_partial=True)
    normal = select_blocks(query, key, SECOND)
    for compose in (union, intersection):
        for other in (second, normal):
            result = compose(first, other)
            assert (result.full_kv_num_blocks == 0).all()
            assert (compose(other, first).full_kv_num_blocks == 0).all()
        assert (compose(normal, normal).full_kv_num_blocks > 0).any()


@pytest.mark.parametrize("compose", [union, intersection])
@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
def test_all_partial_follows_from_either(compose: Any, flags: tuple[bool, bool]) -> None:
    """The first keeps masked blocks alone, so that its lists do not tell how it was made."""
    query, key = blocky_qk(1, 2, 1, N, N, 16)
    narrow = StreamingLLMConfig(sink=0, window=1, block_size=64)
    wide = VerticalSlashConfig(vertical_size=128, slash_size=128, block_size=64)
    first, second = (select_blocks(query, key, c, all_partial=f) for c, f in zip((narrow, wide), flags, strict=True))
    result = compose(first, second)
    assert result.all_partial == any(flags)
    full = result.full_kv_num_blocks.sum()
    assert full == 0 if any(flags) or compose is intersection else full > 0


def test_what_is_not_a_selection() -> None:
    query, key, first, _ = selections()
    wrong: Any = key
    for call in (lambda: union(first, wrong), lambda: block_sparse_attention(query, key, key, wrong)):
        with pytest.raises(
            TypeError, match="a selection must be a BlockSelection, as select_blocks returns, got Tensor"
        ):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_len": 300}, r"got \(2, 4, 500, 500, 64\) and \(2, 4, 300, 500, 64\)"),
        ({"heads": 2}, r"and \(2, 2, 500, 500, 64\)"),
        ({"batch": 1}, r"and \(1, 4, 500, 500, 64\)"),
        ({"config": StreamingLLMConfig()}, r"and \(2, 4, 500, 500, 128\)"),
        ({"starts": [0, 1]}, r"got real ranges \[\[0, 500\], \[0, 500\]\] and \[\[0, 500\], \[1, 500\]\]"),
        ({"lengths": [500, 499]}, r"the same padding"),
    ],
)
def test_selections_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    query, key, first, _ = selections()
    q_len, heads, batch = (change.pop(name, size) for name, size in (("q_len", N), ("heads", 4), ("batch", 2)))
    config = change.pop("config", FIRST)
    other = select_blocks(query[:batch, :heads, -q_len:], key[:batch], config, **change)
    for compose in (union, intersection):
        with pytest.raises(ValueError, match=message):
            compose(first, other)


def test_padding_that_is_spelled_out_is_no_difference() -> None:
    query, key, first, _ = selections()
    union(first, select_blocks(query, key, SECOND, starts=[0, 0], lengths=[N, N]))


def document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Packed sequences of 150 tokens."""
    return q_idx // 150 == kv_idx // 150


def exact_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, allowed: Tensor) -> Tensor:
    """fp64 attention over causal pairs in kept blocks that are allowed, bool [Lq, Lkv]."""
    probability = attention_probabilities(query, key)
    probability = probability * keep.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :N, :N] * allowed
    probability = probability / probability.sum(-1, keepdim=True)
    return probability @ value.double().repeat_interleave(2, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_over_compositions(packed: bool) -> None:
    """Against the oracle, with a document mask too."""
    query, key, first, second = selections(all_partial=packed)
    value = torch.randn_like(key)
    position = torch.arange(N)
    allowed = (position[:, None] // 150 == position // 150) if packed else torch.ones(N, N, dtype=torch.bool)
    flash = select_blocks(query, key, FlashPrefillConfig(0.6, 1, 1, 0, 64), all_partial=packed)
    everywhere = torch.ones(())
    outputs = []
    for selection in (union(first, second), intersection(flash, second)):
        assert selection.density().max() < 0.95
        with torch.no_grad():
            out = block_sparse_attention(query, key, value, selection, mask_mod=document if packed else None)
        expected = exact_attention(query, key, value, selection.to_dense(), allowed)
        assert relative_error(out, expected, everywhere) < 1e-5
        dense = exact_attention(query, key, value, torch.ones_like(selection.to_dense()), allowed)
        assert relative_error(dense, expected, everywhere) > 0.01, "dense attention would pass too"
        outputs.append(out)
    assert relative_error(outputs[0], outputs[1], everywhere) > 0.01
