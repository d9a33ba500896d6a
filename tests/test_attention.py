"""Compiled sparse attention against an fp64 oracle over the selected blocks, for a pairwise cover of the inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compiled import graphs, sdpa_error
from oracle_attention import masked_attention
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, select_blocks, sparse_prefill_attention

TINY = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@dataclass(frozen=True)
class Case:
    """One call; padding is (first real key, real keys) of each batch element."""

    dtype: torch.dtype
    dim: int
    block_size: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    variant: Any = "published"
    padding: tuple[tuple[int, int], ...] | None = None
    batch: int = 1
    scale: float | None = None
    max_budget: int | None = None
    gamma: float = 0.4
    tau: float = 0.1

    @property
    def config(self) -> FlexPrefillConfig:
        return FlexPrefillConfig(self.gamma, self.tau, 1, self.max_budget, self.block_size, self.variant)

    @property
    def padding_arguments(self) -> dict[str, Any]:
        if self.padding is None:
            return {}
        starts, lengths = zip(*self.padding, strict=True)
        return {"starts": list(starts), "lengths": list(lengths)}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key = structured_qk(self.batch, self.heads, self.kv_heads, self.q_len, self.kv_len, self.dim)
        return query.to(self.dtype), key.to(self.dtype), torch.randn(key.shape).to(self.dtype)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    Case(FP32, 64, 128, 1000, 1000, 4, 2),
    Case(FP32, 16, 128, 640, 640, 4, 1, padding=((131, 509), (0, 640)), batch=2, max_budget=384),
    Case(FP32, 96, 64, 129, 700, 6, 2, "paper", padding=((70, 600),), gamma=0.6),
    Case(FP32, 256, 64, 513, 513, 2, 2, scale=0.3, tau=0.5, batch=2),
    Case(BF16, 128, 128, 900, 900, 4, 1, "paper", padding=((0, 700), (130, 770)), batch=2),
    Case(BF16, 80, 64, 600, 600, 4, 2, max_budget=192),
    Case(BF16, 112, 128, 300, 1025, 3, 3, scale=0.2, tau=0.0),
    Case(FP16, 96, 128, 897, 897, 6, 3, "paper", tau=0.5),
    Case(FP16, 64, 64, 700, 700, 8, 2, "paper", padding=((3, 600), (200, 500)), batch=2, max_budget=320),
]


def token_mask(case: Case, keep: Tensor) -> Tensor:
    """bool `[B, Hq, Lq, Lkv]`: pairs that the sparse attention computes."""
    position = torch.arange(case.kv_len)
    start, length = torch.tensor(case.padding or [(0, case.kv_len)] * case.batch).T[..., None]
    real = (position >= start) & (position < start + length)
    offset = case.kv_len - case.q_len
    pairs = (position <= position[offset:, None]) & real[:, None] & real[:, offset:, None]
    cells = keep.repeat_interleave(case.block_size, 2).repeat_interleave(case.block_size, 3)
    return cells[:, :, : case.q_len, : case.kv_len] & pairs[:, None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{str(case.dtype)[6:]}-{case.dim}-{case.block_size}")
def test_equals_oracle_over_the_selected_blocks(case: Case) -> None:
    query, key, value = case.tensors()
    with torch.no_grad():
        out, selection = sparse_prefill_attention(
            query, key, value, case.config, scale=case.scale, return_selection=True, **case.padding_arguments
        )
    assert out.shape == query.shape and out.dtype == case.dtype
    assert out.isfinite().all(), "rows of padding too"
    keep = selection.to_dense()
    same = select_blocks(query, key, case.config, scale=case.scale, **case.padding_arguments)
    assert torch.equal(keep, same.to_dense())
    assert selection.density().mean() < 0.95, "nothing is left out, the comparison says too little"

    exact = masked_attention(query, key, value, keep, case.block_size, case.scale, **case.padding_arguments)
    mask = token_mask(case, keep)
    budget = 2 * sdpa_error(query, key, value, mask, case.scale, exact) + TINY[case.dtype]
    real = mask.any(-1)
    error = (out.double() - exact).abs()[real].max()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"
    dense = masked_attention(
        query, key, value, torch.ones_like(keep), case.block_size, case.scale, **case.padding_arguments
    )
    assert (dense - exact).abs()[real].max() > 3 * budget, "dense attention would pass too"


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=["whole", "padded"])
def test_gamma_one_equals_dense(case: Case) -> None:
    query, key, value = case.tensors()
    with torch.no_grad():
        out, selection = sparse_prefill_attention(
            query, key, value, FlexPrefillConfig(1.0, min_budget=1), return_selection=True, **case.padding_arguments
        )
    assert (selection.density() == 1).all()
    everything = torch.ones_like(selection.to_dense())
    exact = masked_attention(query, key, value, everything, 128, **case.padding_arguments)
    real = token_mask(case, everything).any(-1)
    torch.testing.assert_close(out.double()[real], exact[real], atol=1e-5, rtol=1e-5)


def test_many_kinds_of_calls_stay_sparse_and_share_graphs() -> None:
    """Past the recompile limit of 8 a compiled function silently falls back to dense; this must never happen."""
    before = graphs()
    for index in range(20):
        kv_len, batch = 400 + 23 * index, 2 + index % 3
        q_len = kv_len if index % 4 < 2 else kv_len - 130
        variant = ("published", "paper")[index // 2 % 2]
        config = FlexPrefillConfig(0.2 + 0.02 * index, 0.05 * (index % 3), 1, 384 if index % 5 else None, 128, variant)
        query, key = structured_qk(batch, 4, 1, q_len, kv_len, 16, seed=index)
        value = torch.randn(key.shape)
        padding: dict[str, Any] = {}
        if index % 2:
            padding = {"starts": [index] + [0] * (batch - 1), "lengths": [kv_len - 2 * index] * batch}
        with torch.no_grad():
            out, selection = sparse_prefill_attention(query, key, value, config, return_selection=True, **padding)
        keep = selection.to_dense()
        exact = masked_attention(query, key, value, keep, 128, **padding)
        dense = masked_attention(query, key, value, torch.ones_like(keep), 128, **padding)
        real = exact.abs().sum(-1) > 0  # rows that see nothing are zero
        assert (exact - dense)[real].abs().max() > 1e-3
        torch.testing.assert_close(out.double()[real], exact[real], atol=1e-5, rtol=1e-5)
    assert graphs() - before <= 2, "one graph for whole prompts, one for padding and chunks"


def every_third_key(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx % 3 == 0) | (kv_idx == q_idx)


def recency(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - 0.01 * (h + 1) * (q_idx - kv_idx)


def test_mask_mod_and_score_mod() -> None:
    case = replace(CASES[0], gamma=0.3)
    query, key, value = case.tensors()
    with torch.no_grad():
        masked, selection = sparse_prefill_attention(
            query, key, value, case.config, mask_mod=every_third_key, return_selection=True
        )
        scored = sparse_prefill_attention(query, key, value, case.config, score_mod=recency)
        plain, plain_selection = sparse_prefill_attention(query, key, value, case.config, return_selection=True)
    keep = plain_selection.to_dense()
    assert torch.equal(selection.to_dense(), keep), "the selector does not see either"
    assert (selection.full_kv_num_blocks == 0).all(), "a mask_mod may mask anywhere"
    assert selection.density().mean() < 0.95

    position = torch.arange(case.kv_len)
    pairs = token_mask(case, keep)
    keys, values = (tensor.double().repeat_interleave(2, 1) for tensor in (key, value))
    scores = query.double() @ keys.mT * case.dim**-0.5
    thirds = (position % 3 == 0) | (position == position[:, None])
    expected = scores.masked_fill(~(pairs & thirds), -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(masked.double(), expected, atol=1e-5, rtol=1e-5)
    slope = 0.01 * (torch.arange(case.heads) + 1)[:, None, None] * (position[:, None] - position)
    expected = (scores - slope).masked_fill(~pairs, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(scored.double(), expected, atol=1e-5, rtol=1e-5)
    assert (plain - masked).abs().max() > 0.05 and (plain - scored).abs().max() > 0.05
