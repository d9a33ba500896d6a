"""The laws of FlexAttention that a change could break: layout of the lists, lengths, and what mask_mod means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled_attention
from oracle_attention import masked_attention
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
)
from workloads import structured_qk

from flexprefill_fa import BlockSelection, FlexPrefillConfig, create_flexprefill_block_mask, select_blocks
from flexprefill_fa.block_mask import causal, to_block_mask
from flexprefill_fa.index_lists import index_lists

LENGTH, HEADS, KV_HEADS, DIM = 701, 4, 2, 32
SPARSE = FlexPrefillConfig(gamma=0.3, tau=0.0, min_budget=1)


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    query, key = structured_qk(1, HEADS, KV_HEADS, LENGTH, LENGTH, DIM)
    return query, key, torch.randn(key.shape)


def lists_of(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices


def token_mask(keep: Tensor, q_len: int, kv_len: int, size: int) -> Tensor:
    return keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :q_len, :kv_len]


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), [(640, 640), (701, 701), (129, 701), (1, 701), (127, 127)])
@pytest.mark.parametrize("eager_safe", [True, False])
def test_layout_of_the_lists(q_len: int, kv_len: int, block_size: int, eager_safe: bool) -> None:
    query, key = structured_qk(2, HEADS, KV_HEADS, q_len, kv_len, DIM)
    mask = create_flexprefill_block_mask(
        query, key, gamma=0.3, min_budget=1, block_size=block_size, lengths=[kv_len, kv_len - 50], eager_safe=eager_safe
    )
    kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices = lists_of(mask)
    rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
    width = 4 + columns
    for count, indices in ((kv_num_blocks, kv_indices), (full_kv_num_blocks, full_kv_indices)):
        assert count.shape == (2, HEADS, rows), "the head dimension is Hq"
        assert indices.shape[:-1] == count.shape and 1 <= indices.shape[-1] <= columns
        assert count.dtype == indices.dtype == torch.int32
        assert count.is_contiguous() and indices.stride() == (HEADS * rows * width, rows * width, width, 1)
    assert kv_indices.shape == full_kv_indices.shape
    assert kv_indices.shape[-1] == columns, "the CPU kernel wants the partial list at full width"
    storages = {tensor.untyped_storage().data_ptr() for tensor in lists_of(mask)}
    assert len(storages) == 3, "both lists in one tensor"
    assert full_kv_indices.data_ptr() - kv_indices.data_ptr() == 16, "the alignment that kernels are compiled for"
    assert kv_indices.untyped_storage().nbytes() == 4 * 2 * HEADS * rows * width
    assert mask.seq_lengths == (q_len, kv_len), "lengths are not rounded up to blocks"
    assert (block_size, block_size) == mask.BLOCK_SIZE
    for transposed in (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices):
        assert transposed is None


def test_compiled_follows_the_lists_and_uncompiled_the_mask_mod(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Law 1: without eager_safe an uncompiled call is dense causal, silently. With it, both mean the same."""
    query, key, value = tensors
    selection = select_blocks(query, key, SPARSE)
    keep = selection.to_dense()
    assert (selection.density() < 0.9).all()
    sparse = masked_attention(query, key, value, keep, 128).float()
    dense = masked_attention(query, key, value, torch.ones_like(keep), 128).float()
    assert (sparse - dense).abs().max() > 0.05

    plain = create_flexprefill_block_mask(query, key, config=SPARSE, eager_safe=False)
    safe = create_flexprefill_block_mask(query, key, config=SPARSE)
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(compiled_attention(query, key, value, plain), sparse, **close)
    torch.testing.assert_close(compiled_attention(query, key, value, safe), sparse, **close)
    uncompiled = flex_attention(query, key, value, block_mask=plain, enable_gqa=True)
    torch.testing.assert_close(uncompiled, dense, **close)
    uncompiled = flex_attention(query, key, value, block_mask=safe, enable_gqa=True)
    torch.testing.assert_close(uncompiled, sparse, **close)


def test_a_block_in_both_lists_counts_twice(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Why the two lists must be disjoint; ours are, and this is what would go wrong."""
    query, key, value = tensors
    selection = select_blocks(query, key, SPARSE)
    right = compiled_attention(query, key, value, to_block_mask(selection, causal))
    keep = selection.to_dense()
    twice = replace_lists(selection, keep, keep & (torch.arange(6) < torch.arange(6)[:, None]))
    wrong = compiled_attention(query, key, value, to_block_mask(twice, causal))
    assert (right - wrong).abs().max() > 0.01
    all_partial = replace_lists(selection, keep, torch.zeros_like(keep))
    same = compiled_attention(query, key, value, to_block_mask(all_partial, causal))
    torch.testing.assert_close(same, right, atol=1e-5, rtol=1e-5)


def replace_lists(selection: BlockSelection, partial: Tensor, full: Tensor) -> BlockSelection:
    (count, indices), (full_count, full_indices) = index_lists(partial), index_lists(full)
    return replace(
        selection,
        kv_num_blocks=count,
        kv_indices=indices,
        full_kv_num_blocks=full_count,
        full_kv_indices=full_indices,
    )


@pytest.mark.parametrize("dropped", [(0, 0, 5, 0), (0, 3, 2, 0), (0, 1, 4, 4)])
def test_dropping_one_block_changes_the_output(
    tensors: tuple[Tensor, Tensor, Tensor], dropped: tuple[int, int, int, int]
) -> None:
    """One full or partial block less: its rows change to the oracle's value without it, and nothing else does."""
    query, key, value = tensors
    selection = select_blocks(query, key, SPARSE)
    keep = selection.to_dense()
    assert keep[dropped], "pick a kept block"
    below = torch.arange(6) < torch.arange(6)[:, None]
    before = compiled_attention(query, key, value, to_block_mask(selection, causal))
    keep[dropped] = False
    smaller = replace_lists(selection, keep & ~below, keep & below)
    after = compiled_attention(query, key, value, to_block_mask(smaller, causal))
    _, head, row, _ = dropped
    rows = slice(row * 128, (row + 1) * 128)
    change = (after - before).abs()
    assert change[0, head, rows].max() > 1e-3
    change[0, head, rows] = 0
    assert change.max() == 0
    seen = token_mask(keep, LENGTH, LENGTH, 128)[0, head] & torch.ones(LENGTH, LENGTH).tril().bool()
    some = seen.any(-1)  # a row whose diagonal was dropped may see nothing
    expected = masked_attention(query, key, value, keep, 128).float()
    torch.testing.assert_close(after[0, head][some], expected[0, head][some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("q_len", [LENGTH, 300])
def test_create_mask_agrees_with_the_selection(block_size: int, q_len: int) -> None:
    query, key = structured_qk(2, HEADS, KV_HEADS, q_len, LENGTH, DIM)
    config = replace(SPARSE, block_size=block_size)
    starts, lengths = [0, 70], [LENGTH - 100, LENGTH - 70]
    block_mask = create_flexprefill_block_mask(query, key, config=config, starts=starts, lengths=lengths)
    keep = select_blocks(query, key, config, starts=starts, lengths=lengths).to_dense()
    position = torch.arange(LENGTH)
    causal_pairs = position <= position[LENGTH - q_len :, None]
    real = torch.stack([(position >= s) & (position < s + n) for s, n in zip(starts, lengths, strict=True)])
    expected = token_mask(keep, q_len, LENGTH, block_size) & causal_pairs & real[:, None, None]
    actual = create_mask(block_mask.mask_mod, 2, HEADS, q_len, LENGTH, device="cpu")
    assert torch.equal(actual, expected)


def test_and_masks_composes(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """An eager_safe mask_mod inside and_masks and create_block_mask keeps its meaning."""
    query, key, value = tensors
    ours = create_flexprefill_block_mask(query, key, config=SPARSE)

    def even_keys(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx % 2 == 0) | (q_idx == kv_idx)

    composed = create_block_mask(and_masks(ours.mask_mod, even_keys), 1, HEADS, LENGTH, LENGTH, device="cpu")
    out = compiled_attention(query, key, value, composed)
    position = torch.arange(LENGTH)
    even = (position % 2 == 0) | (position == position[:, None])
    pairs = create_mask(ours.mask_mod, 1, HEADS, LENGTH, LENGTH, device="cpu") & even
    keys, values = (t.double().repeat_interleave(2, 1) for t in (key, value))
    scores = (query.double() @ keys.mT * DIM**-0.5).masked_fill(~pairs, -torch.inf)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ values, atol=1e-5, rtol=1e-5)
