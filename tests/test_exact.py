"""Exact attention by blocks, against dense fp64 attention."""

from __future__ import annotations

import pytest
import torch
from oracle_attention import attention_probabilities
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, select_blocks
from flexprefill_fa.exact import block_mass


def summed(probabilities: Tensor, block: int) -> Tensor:
    """`[B, H, nq, nk]` sums of `[B, H, Lq, Lkv]`, cell by cell."""
    rows = torch.stack([part.sum(-2) for part in probabilities.split(block, -2)], -2)
    return torch.stack([part.sum(-1) for part in rows.split(block, -1)], -1)


def capped_probabilities(query: Tensor, key: Tensor, cap: float) -> Tensor:
    """fp64 `[B, H, n, n]` of causal attention with capped scores."""
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = cap * torch.tanh(query.double() @ keys.mT / query.shape[-1] ** 0.5 / cap)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "starts", "lengths"),
    [
        (1, 1, None, None),
        (127, 127, None, None),
        (129, 600, None, None),
        (512, 512, None, None),
        (500, 500, [0, 131], [500, 300]),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.4])
def test_block_mass_equals_dense_attention(
    q_len: int, kv_len: int, starts: list[int] | None, lengths: list[int] | None, scale: float | None
) -> None:
    """Grouped heads, lengths that no block divides, padding and a chunk."""
    query, key = structured_qk(2, 4, 2, q_len, kv_len, 32)
    first, count = (None if given is None else torch.tensor(given) for given in (starts, lengths))
    mass = block_mass(query, key, 64, scale=scale, starts=first, lengths=count)
    expected = summed(attention_probabilities(query, key, scale, starts, lengths), 64)
    assert mass.dtype == torch.float32 and mass.shape == expected.shape
    torch.testing.assert_close(mass, expected.float(), atol=2e-5, rtol=1e-5)
    if starts is None:
        rows = torch.tensor([min(64, q_len - first) for first in range(0, q_len, 64)])
        torch.testing.assert_close(mass.sum(-1), rows.float().expand(2, 4, -1))


def test_block_mass_in_pieces_equals_block_mass_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = structured_qk(1, 4, 2, 700, 700, 16)
    at_once = block_mass(query, key, 128)
    monkeypatch.setattr("flexprefill_fa.exact.SCORE_BYTES", 1)
    torch.testing.assert_close(block_mass(query, key, 128), at_once)


def test_capped_scores() -> None:
    query, key = structured_qk(1, 4, 2, 300, 300, 32)
    probabilities = capped_probabilities(query, key, 0.5)
    mass = block_mass(query, key, 64, softcap=0.5)
    torch.testing.assert_close(mass, summed(probabilities, 64).float(), atol=1e-5, rtol=1e-5)
    assert (mass - block_mass(query, key, 64)).abs().max() > 0.1, "a cap without effect"

    selection = select_blocks(query, key, FlexPrefillConfig(0.4, 0.1, 1, None, 64))
    kept = (summed(probabilities, 64) * selection.to_dense()).sum((-2, -1)) / 300
    torch.testing.assert_close(selection.recall(query, key, softcap=0.5), kept.float(), atol=1e-5, rtol=0)


def test_recall_is_the_kept_share_of_the_mass() -> None:
    query, key = structured_qk(2, 4, 2, 500, 500, 32)
    starts, lengths = torch.tensor([0, 70]), torch.tensor([500, 300])
    selection = select_blocks(query, key, FlexPrefillConfig(0.4, 0.1, 1, None, 64), starts=starts, lengths=lengths)
    mass = block_mass(query, key, 64, starts=starts, lengths=lengths)
    assert selection.real_rows().tolist() == [500, 300]
    share = (mass * selection.to_dense()).sum((-2, -1)) / selection.real_rows()[:, None]
    torch.testing.assert_close(share, selection.recall(query, key), atol=1e-6, rtol=0)
    assert share.max() < 0.999, "nothing was dropped"
