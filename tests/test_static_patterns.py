"""StreamingLLM and fixed vertical-slash: token by token, and against FlexPrefill's oracle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracle_flexprefill import oracle_select
from torch import Tensor
from workloads import random_qk, structured_qk

from flexprefill_fa import StreamingLLMConfig, VerticalSlashConfig, select_blocks
from flexprefill_fa.block_mask import check_layout
from flexprefill_fa.grid import visible_blocks
from flexprefill_fa.masks.vertical_slash import select_by_triton

pytestmark = pytest.mark.usefixtures("one_thread")

# (q_len, kv_len, starts, lengths)
PLACES: list[tuple[int, int, list[int] | None, list[int] | None]] = [
    (1, 1, None, None),
    (127, 127, None, None),
    (129, 129, None, None),
    (300, 300, None, None),
    (640, 640, None, None),
    (300, 900, None, None),
    (129, 701, None, None),
    (1, 500, None, None),
    (500, 500, [0, 131], None),
    (500, 500, None, [369, 1]),
    (400, 700, [77, 320], [600, 380]),
    (100, 500, [0, 5], [300, 495]),
]


def touched(q_len: int, kv_len: int, start: int, end: int, sink: int, window: int, size: int) -> Tensor:
    """bool [nq, nk]: blocks with a pair that the pattern keeps, from every pair of tokens."""
    pairs = torch.zeros(-(-q_len // size) * size, -(-kv_len // size) * size, dtype=torch.bool)
    offset = kv_len - q_len
    for query in range(max(start, offset), end):
        row = pairs[query - offset]
        row[start : min(start + sink, query + 1)] = True
        row[max(start, query - window + 1) : query + 1] = True
    return pairs.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
def test_streaming_llm_keeps_the_blocks_that_its_pairs_touch(place: tuple, block_size: int) -> None:
    q_len, kv_len, starts, lengths = place
    query, key = random_qk(2, 2, 1, q_len, kv_len, 16)
    for sink, window in ((128, 2048), (0, 1), (1, 64), (64, 65), (65, 130), (200, 129)):
        config = StreamingLLMConfig(sink, window, block_size)
        selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
        for b, (start, end) in enumerate(selection.ranges.tolist()):
            expected = touched(q_len, kv_len, start, end, sink, window, block_size)
            assert torch.equal(selection.to_dense()[b], expected.expand(2, -1, -1)), (sink, window)
        if kv_len <= config.dense_tokens:
            assert torch.equal(selection.density() == 1, selection.kept_blocks() > 0)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_vertical_slash_with_equal_sizes_is_flexprefill_with_fixed_budgets(place: tuple, block_size: int) -> None:
    """Counts clamped from below by min_budget, which FlexPrefill's oracle knows; its short prompts aside."""
    q_len, kv_len, starts, lengths = place
    query, key = structured_qk(2, 4, 2, q_len, kv_len, 32, seed=q_len)
    for size in (1, 100, 3 * block_size):
        config = VerticalSlashConfig(size, size, block_size)
        selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
        oracle = oracle_select(
            query, key, gamma=1e-9, tau=0.0, min_budget=size, max_budget=None, block_size=block_size,
            variant="published", starts=starts, lengths=lengths,
        )  # fmt: skip
        real = selection.ranges[:, 1] - selection.ranges[:, 0]
        short = real <= max(2 * block_size, -(-size // block_size) * block_size)
        clear = (torch.from_numpy(oracle.margin) >= 1e-5) & ~short[:, None]
        assert torch.equal(selection.to_dense()[clear], torch.from_numpy(oracle.keep)[clear])
        assert clear.any() or short.any()


def test_vertical_slash_counts() -> None:
    """As many columns and diagonals as asked for, the first and the main one among them."""
    n, size = 1280, 64
    query, key = structured_qk(1, 4, 2, n, n, 32)
    for vertical, slash in ((1, 1), (64, 200), (300, 1), (130, 130)):
        keep = select_blocks(query, key, VerticalSlashConfig(vertical, slash, size)).to_dense()[0]
        columns = keep[:, -1].sum(-1)  # of the last row: columns, and diagonals, which may meet
        assert (columns <= -(-vertical // size) + -(-slash // size)).all()
        assert keep[:, :, 0].all() and keep.diagonal(dim1=-2, dim2=-1).all()
        whole = torch.stack([keep[:, block:, block].all(-1) for block in range(n // size - 1)], 1).sum(-1)
        assert (whole >= min(-(-vertical // size), 19) - 1).all()  # the last column cannot be told from a diagonal
    for config in (VerticalSlashConfig(n, 1, size), VerticalSlashConfig(1, n, size)):
        assert config.dense_tokens == n
        assert (select_blocks(query, key, config).density() == 1).all()


def padding(values: Sequence[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, see test_gpu_selectors.py")
@pytest.mark.parametrize("place", [PLACES[2], (129, 301, [0, 70], [280, 231])], ids=str)
def test_vertical_slash_kernels_equal_the_reference(place: tuple) -> None:
    q_len, kv_len, starts, lengths = place
    query, key = structured_qk(2, 2, 1, q_len, kv_len, 16)
    place_tensors = padding(starts), padding(lengths)
    for config in (VerticalSlashConfig(100, 200, 64), VerticalSlashConfig(2**40, 1, 64)):
        expected = config.operator()(query, key, *place_tensors, config.settings(), None, 64, False, True)
        got = select_by_triton(query, key, *place_tensors, config, zero_tails=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("config", [StreamingLLMConfig(64, 100, 64), VerticalSlashConfig(64, 64, 64)], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_well_formed(config, place: tuple) -> None:
    q_len, kv_len, starts, lengths = place
    query, key = structured_qk(2, 2, 1, q_len, kv_len, 16)
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
    check_layout(selection)
    for count, indices in (
        (selection.kv_num_blocks, selection.kv_indices),
        (selection.full_kv_num_blocks, selection.full_kv_indices),
    ):
        pairs = torch.arange(1, indices.shape[-1]) < count[..., None]
        assert (indices.diff(dim=-1)[pairs] > 0).all()
    keep = selection.to_dense()
    assert torch.equal(keep.sum((-2, -1)), selection.kept_blocks()), "no block in both lists"
    assert not (keep & ~visible_blocks(selection.grid, selection.ranges)[:, None]).any()
    partial = select_blocks(query, key, config, starts=starts, lengths=lengths, all_partial=True)
    assert torch.equal(partial.to_dense(), keep) and (partial.full_kv_num_blocks == 0).all()
