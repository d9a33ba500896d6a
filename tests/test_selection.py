"""BlockSelection: density, to_dense, recall and repr on selections made by hand, and the layout check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle_attention import attention_probabilities, recall
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import BlockSelection, FlexPrefillConfig, select_blocks
from flexprefill_fa.block_mask import causal, check_layout, to_block_mask
from flexprefill_fa.index_lists import index_lists


def by_hand(keep: list[list[int]], q_len: int, kv_len: int, **padding: Any) -> BlockSelection:
    """One batch element and head that keeps keep[I] in row I, all partial."""
    dense = torch.zeros(1, 1, len(keep), -(-kv_len // 64), dtype=torch.bool)
    for row, blocks in enumerate(keep):
        dense[0, 0, row, blocks] = True
    nothing = index_lists(torch.zeros_like(dense))
    return BlockSelection(*index_lists(dense), *nothing, q_len, kv_len, 64, **padding)


def test_density_counts_by_hand() -> None:
    assert by_hand([[0], [0, 1], [0, 2]], 192, 192).density().item() == pytest.approx(5 / 6)
    # 100 queries after 50 cached keys: blocks 0..1 are visible to row 0 (positions 50 to 113), 0..2 to row 1.
    assert by_hand([[0, 1], [2]], 100, 150).density().item() == pytest.approx(3 / 5)
    # Block 0 is padding; rows 1, 2, 3 see 1, 2, 3 blocks.
    padded = by_hand([[], [1], [1, 2], [1]], 256, 256, starts=torch.tensor([64]))
    assert padded.density().item() == pytest.approx(4 / 6)
    # 100 real keys: rows 0 and 1 alone hold real queries.
    padded = by_hand([[0], [1], []], 192, 192, lengths=torch.tensor([100]))
    assert padded.density().item() == pytest.approx(2 / 3)


def test_density_of_an_element_without_real_queries() -> None:
    nothing = by_hand([[]], 50, 200, lengths=torch.tensor([100]))
    assert nothing.density().item() == 0


def test_entries_past_the_counts_mean_nothing() -> None:
    selection = by_hand([[0], [0, 1], [0, 2]], 192, 192)
    dense = selection.to_dense()
    tail = torch.arange(3) >= selection.kv_num_blocks[..., None]
    selection.kv_indices[tail] = 7**9
    selection.full_kv_indices.fill_(-(2**31))
    assert torch.equal(selection.to_dense(), dense)
    assert selection.density().item() == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "starts", "lengths"),
    [(500, 500, None, None), (129, 600, None, None), (500, 500, [0, 131], [500, 300]), (1, 300, None, None)],
)
@pytest.mark.parametrize("scale", [None, 0.4])
def test_recall_equals_oracle(
    q_len: int, kv_len: int, starts: list[int] | None, lengths: list[int] | None, scale: float | None
) -> None:
    query, key = structured_qk(2, 4, 2, q_len, kv_len, 32)
    config = FlexPrefillConfig(0.4, 0.1, 1, None, 64)
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths, scale=scale)
    probabilities = attention_probabilities(query, key, scale, starts, lengths)
    expected = recall(probabilities, selection.to_dense(), 64, starts, lengths)
    actual = selection.recall(query, key, scale=scale)
    assert actual.dtype == torch.float32 and actual.shape == (2, 4)
    torch.testing.assert_close(actual, expected.float(), atol=1e-5, rtol=0)
    assert q_len == 1 or (actual < 1 - 1e-4).any()


def test_recall_in_pieces_equals_recall_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = structured_qk(1, 2, 1, 700, 700, 16)
    selection = select_blocks(query, key, FlexPrefillConfig(0.4, 0.0, 1, None, 64))
    at_once = selection.recall(query, key)
    monkeypatch.setattr("flexprefill_fa.exact.SCORE_BYTES", 1)
    torch.testing.assert_close(selection.recall(query, key), at_once)


def test_recall_of_everything_is_one() -> None:
    query, key = structured_qk(2, 4, 2, 300, 300, 32)
    selection = select_blocks(query, key, FlexPrefillConfig(1.0, min_budget=1), starts=[0, 40])
    torch.testing.assert_close(selection.recall(query, key), torch.ones(2, 4))


def test_recall_refuses_other_tensors() -> None:
    query, key = structured_qk(1, 4, 2, 300, 400, 32)
    selection = select_blocks(query, key, FlexPrefillConfig())
    message = r"expected \(q_len, kv_len, batch, heads\) = \(300, 400, 1, 4\), got \(299, 400, 1, 4\)"
    with pytest.raises(ValueError, match=message):
        selection.recall(query[:, :, :299], key)
    with pytest.raises(ValueError, match=r"got \(300, 399, 1, 4\)"):
        selection.recall(query, key[:, :, :399])
    with pytest.raises(ValueError, match=r"got \(300, 400, 1, 2\)"):
        selection.recall(query[:, :2], key)


def test_repr_says_what_matters() -> None:
    text = repr(by_hand([[0], [0, 1], [0, 2]], 192, 192))
    for part in ("batch=1", "heads=1", "q_len=192", "kv_len=192", "block_size=64", "density=0.833", "cpu"):
        assert part in text
    assert "padded" not in text and "tensor" not in text
    assert "padded" in repr(by_hand([[0], [0, 1], [0, 2]], 192, 192, lengths=torch.tensor([190])))


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_indices": lambda t: t.long()}, "kv_indices must be int32, got torch.int64"),
        ({"full_kv_num_blocks": lambda t: t.float()}, "full_kv_num_blocks must be int32, got torch.float32"),
        (
            {"full_kv_indices": lambda t: t[..., :2]},
            r"full_kv_indices must have shape \(1, 1, 3, 3\), got \(1, 1, 3, 2\)",
        ),
        ({"kv_num_blocks": lambda t: t[:, :, :2]}, r"kv_num_blocks must have shape \(1, 1, 3\), got \(1, 1, 2\)"),
        (
            {"kv_indices": strided},
            r"kv_indices must have strides \(18, 18, 6, 1\), got \(18, 18, 6, 2\)",
        ),
        (
            {"full_kv_indices": lambda t: F.pad(t, (0, 4))[..., :3]},
            r"full_kv_indices must have strides \(9, 9, 3, 1\), got \(21, 21, 7, 1\)",
        ),
        (
            {"full_kv_num_blocks": strided},
            r"full_kv_num_blocks must have strides \(3, 3, 1\), got \(6, 6, 2\)",
        ),
        ({"kv_indices": lambda t: t[..., :0]}, "kv_indices must be 1 to 3 blocks wide, got 0"),
        ({"kv_indices": lambda t: torch.cat((t, t), -1)}, "kv_indices must be 1 to 3 blocks wide, got 6"),
    ],
)
def test_layout_errors(changes: dict[str, Any], message: str) -> None:
    selection = by_hand([[0], [0, 1], [0, 2]], 192, 192)
    check_layout(selection)
    wrong = replace(selection, **{name: change(getattr(selection, name)) for name, change in changes.items()})
    with pytest.raises(ValueError, match=message):
        check_layout(wrong)
    with pytest.raises(ValueError, match=message):
        to_block_mask(wrong, causal)
