"""Both index lists in one tensor: the bound that makes room for the full list, the memory, and who reads them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import needs
import pytest
import torch
from every_selector import example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from workloads import blocky_qk, structured_qk

from flexprefill_fa import (
    BlockSelection,
    StreamingLLMConfig,
    block_sparse_attention,
    create_flashprefill_block_mask,
    get_selector,
    select_blocks,
    union,
)
from flexprefill_fa.grid import Grid, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.index_lists import PARTIAL, index_lists, shared_lists
from flexprefill_fa.kernels import outputs
from flexprefill_fa.kernels.kept_map import kept_map
from flexprefill_fa.masks.selector import kernels_of
from flexprefill_fa.selection import every_block

MOST = 3  # partial blocks of a row
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there")


def partial_blocks(grid: Grid, ranges: Tensor) -> Tensor:
    """int64 `[B, nq]`: how many a row has that keeps every block that it sees."""
    return (visible_blocks(grid, ranges) & ~unmasked_blocks(grid, ranges)).sum(-1)


def partial_pairs(grid: Grid, ranges: Tensor) -> Tensor:
    """`partial_blocks` from the pairs of queries and keys: blocks with one that is computed and one that is not."""
    size, (start, end) = grid.block_size, ranges.long()[..., None, None].unbind(1)
    query = grid.offset + torch.arange(grid.q_blocks * size)[:, None]
    key = torch.arange(grid.kv_blocks * size)
    real_key = (key >= start) & (key < end)
    real_query = (query >= start) & (query < end) & (query < grid.kv_len)
    computed = (key <= query) & real_key
    pairs = (x.expand(len(ranges), *computed.shape[1:]) for x in (computed & real_query, ~computed))
    some, masked = (x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).any(-1).any(2) for x in pairs)
    return (some & masked).sum(-1)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_no_row_has_more_partial_blocks_than_have_room(size: int) -> None:
    """Of every length, chunk and padding of up to four blocks and a bit; blocks of other sizes are alike."""
    most = 0
    for kv_len in range(1, 4 * size + 2):
        start, end = torch.ones(kv_len + 1, kv_len + 1).triu().nonzero().unbind(1)
        ranges = torch.stack((start, end), 1).to(torch.int32)
        for q_len in range(1, kv_len + 1):
            grid = Grid(q_len, kv_len, size)
            found = partial_blocks(grid, ranges)
            assert (found >= partial_pairs(grid, ranges)).all()
            most = max(most, int(found.max()))
    assert most == min(size, MOST) < PARTIAL and PARTIAL * 4 % 16 == 0


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_drawn_row_does(data: st.DataObject) -> None:
    kv_len = data.draw(st.integers(1, 3000))
    grid = Grid(data.draw(st.integers(1, kv_len)), kv_len, data.draw(st.sampled_from((64, 128))))
    starts = torch.tensor([data.draw(st.integers(0, kv_len))])
    lengths = torch.tensor([data.draw(st.integers(0, kv_len))])
    assert partial_blocks(grid, real_ranges(starts, lengths, 1, kv_len, torch.device("cpu"))).max() <= MOST


def test_three_in_a_row() -> None:
    """The block of the first key, and two that the boundary of a chunk crosses, the latter with the last key."""
    query, key = structured_qk(1, 2, 1, 130, 330, 16)
    everything = StreamingLLMConfig(0, 330, 64)
    kept = select_blocks(query, key, everything, starts=[5], lengths=[320])
    assert kept.kv_num_blocks.tolist() == [[[3, 3, 0]] * 2] and kept.density().eq(1).all()
    assert kept.kv_indices[0, 0, 0, :3].tolist() == [0, 3, 4] and kept.full_kv_indices[0, 0, 0, :2].tolist() == [1, 2]


def selected(**options: Any) -> BlockSelection:
    query, key = structured_qk(2, 4, 2, 330, 700, 16)
    return select_blocks(query, key, example("flashprefill"), starts=[0, 70], **options)


def in_two_tensors(selection: BlockSelection) -> BlockSelection:
    lists = {name: getattr(selection, name).clone(memory_format=torch.contiguous_format) for name in INDICES}
    return replace(selection, **lists)


INDICES = ("kv_indices", "full_kv_indices")


@pytest.mark.parametrize("name", ["flashprefill", "peakprefill", "streaming_llm", "every block"])
@pytest.mark.parametrize("all_partial", [False, True])
def test_both_lists_are_one_tensor(name: str, all_partial: bool) -> None:
    query, key = structured_qk(2, 4, 2, 330, 700, 16)
    if name == "every block":
        selection = every_block(query, key, 64)
    else:
        selection = select_blocks(query, key, example(name), all_partial=all_partial)
    partial, full = selection.kv_indices, selection.full_kv_indices
    assert partial.shape == full.shape == (2, 4, 6, 11) and partial.stride() == full.stride()
    assert full.data_ptr() - partial.data_ptr() == 4 * PARTIAL
    storage = partial.untyped_storage()
    assert storage.data_ptr() == full.untyped_storage().data_ptr() == partial.data_ptr()
    assert storage.nbytes() == 4 * 2 * 4 * 6 * (PARTIAL + 11)


def test_a_table_of_few_columns() -> None:
    for blocks in (1, 2, 3):
        keep = torch.ones(1, 1, 1, blocks, dtype=torch.bool)
        count, full_count, indices = shared_lists(keep, ~keep)
        assert (count.item(), full_count.item()) == (blocks, 0) and indices.shape[-1] == PARTIAL + blocks
        assert indices[0, 0, 0].tolist() == [*range(blocks), *[0] * PARTIAL]
        count, full_count, indices = shared_lists(~keep, keep)
        assert (count.item(), full_count.item()) == (0, blocks)
        assert indices[0, 0, 0].tolist() == [*[0] * PARTIAL, *range(blocks)]


WRITERS = ["flashprefill", "flexprefill", "flexprefill, paper", "peakprefill", "vertical_slash"]
# Each with both values of either flag, and all four pairs of values among them.
WRITTEN = [(name, zero, zero == bool(number % 2)) for number, name in enumerate(WRITERS) for zero in (False, True)]


@needs_interpreter
@pytest.mark.parametrize(("name", "zero_tails", "all_partial"), WRITTEN)
def test_kernels_write_nothing_beside_the_tensor(
    name: str, zero_tails: bool, all_partial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a part of a larger tensor, full of what is no block."""
    buffers = []

    def inside(*arguments: Any) -> tuple[Tensor, ...]:
        parts = []
        for part in whole(*arguments):
            buffer = torch.full((part.numel() + 512,), -7, dtype=torch.int32)
            buffers.append(buffer)
            parts.append(buffer[256:-256].view(part.shape))
        return tuple(parts)

    whole = outputs.empty_lists
    kind = get_selector(name.partition(",")[0])
    module = str(kind.triton).partition(":")[0]
    if name == "vertical_slash":
        module = "flexprefill_fa.kernels.outputs"
    kernels_of(kind.name)  # imports it
    monkeypatch.setattr(f"{module}.empty_lists", inside)
    fields: dict[str, Any] = {"variant": "paper"} if "paper" in name else {}
    config = example(kind.name, **fields)
    query, key = blocky_qk(2, 2, 1, 200, 330, 16)
    place = torch.tensor([0, 70]), torch.tensor([330, 243])
    found = kernels_of(kind.name)(query, key, *place, config, None, all_partial, zero_tails)
    assert len(buffers) == 3 and found[2].data_ptr() == buffers[2][256:].data_ptr()
    for buffer in buffers:
        assert (buffer[:256] == -7).all() and (buffer[-256:] == -7).all()
    column = torch.arange(found[2].shape[-1])
    listed = (column < found[0][..., None]) | (column >= PARTIAL) & (column < PARTIAL + found[1][..., None])
    assert (found[2][listed] >= 0).all() and listed.any() and not listed.all()
    if zero_tails:
        assert (found[2][~listed] == 0).all()


@needs_interpreter
@pytest.mark.parametrize("all_partial", [False, True])
def test_the_kernels_table_takes_both_forms(all_partial: bool) -> None:
    selection = selected(all_partial=all_partial)
    dense = selection.to_dense()
    assert dense.any() and not dense.all()
    for form in (selection, in_two_tensors(selection)):
        assert torch.equal(kept_map(form.lists, form.grid).bool(), dense)


@pytest.mark.parametrize("correction", [False, pytest.param(True, marks=needs.mean_correction)])
def test_attention_takes_both_forms(correction: bool) -> None:
    query, key = structured_qk(2, 4, 2, 330, 700, 16)
    value = torch.randn_like(key)
    selection = selected()
    forms = selection, in_two_tensors(selection), union(selection, selection)
    assert [form.kv_indices.stride(2) for form in forms] == [15, 11, 11]
    outs = [block_sparse_attention(query, key, value, form, mean_correction=correction) for form in forms]
    assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])
    fewer = replace(selection, full_kv_num_blocks=(selection.full_kv_num_blocks - 1).clamp(min=0))
    out = block_sparse_attention(query, key, value, fewer, mean_correction=correction)
    assert not torch.allclose(out, outs[0], atol=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_mask_and_attention_in_one_graph_of_the_caller(dynamic: bool) -> None:
    config = example("flashprefill")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = create_flashprefill_block_mask(query, key, config=config, eager_safe=False)
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)  # pyright: ignore

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for length in (700, 513):
        query, key = structured_qk(1, 4, 2, length, length, 32, seed=length)
        value = torch.randn_like(key)
        selection = select_blocks(query, key, config)
        assert (selection.density() < 0.9).all()
        expected = block_sparse_attention(query, key, value, selection)
        torch.testing.assert_close(compiled(query, key, value), expected, atol=1e-5, rtol=1e-5)


def test_copies_hold_the_same_blocks() -> None:
    selection = selected()
    for copied in (copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
        assert torch.equal(copied.to_dense(), selection.to_dense())
        assert copied.kv_indices.data_ptr() != selection.kv_indices.data_ptr()
    query, key = structured_qk(1, 4, 2, 330, 700, 16)
    mask = create_flashprefill_block_mask(query, key, config=example("flashprefill"))
    moved: Any = mask.to("meta")
    for name in INDICES:
        assert getattr(moved, name).shape == getattr(mask, name).shape
    assert moved.kv_indices.stride() == moved.full_kv_indices.stride()
    assert torch.equal(mask[:, 1:2].to_dense(), mask.to_dense()[:, 1:2])


def test_lists_of_tables() -> None:
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    count, full_count, indices = shared_lists(keep, None)
    assert not full_count.any() and indices.shape[-1] == PARTIAL + 9
    expected = index_lists(keep)
    assert torch.equal(count, expected[0]) and torch.equal(indices[..., :9], expected[1])
    assert not indices[..., 9:].any()
