"""Mean correction against its definition, token by token in fp64: by FlexAttention on the CPU, and in Triton."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracle import causal_oracle, relative_error
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import (
    BlockSelection,
    FlashPrefillConfig,
    FlexPrefillConfig,
    StreamingLLMConfig,
    block_sparse_attention,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.validation import check_mean_correction

HAS_GPU = torch.cuda.is_available()
SMALL = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=64, block_size=64)


def by_definition(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, scale: float) -> Tensor:
    """fp64 [B, Hq, Lq, D]; rows of padded queries are 0."""
    size, keep = selection.block_size, selection.to_dense()
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for b, (start, end) in enumerate(selection.ranges.tolist()):
        for h in range(query.shape[1]):
            q, k, v = (x.double() for x in (query[b, h], key[b, h // groups], value[b, h // groups]))
            for i in range(query.shape[2]):
                position = selection.grid.offset + i
                if not start <= position < end:
                    continue
                weights, values = [], []
                for block in range(selection.grid.kv_blocks):
                    first, last = max(start, block * size), min(end, block * size + size) - 1
                    if last < first:
                        continue
                    if keep[b, h, i // size, block]:
                        seen = slice(first, min(last, position) + 1)
                        weights.append((scale * (k[seen] @ q[i])).exp())
                        values.append(v[seen])
                    elif last <= position:
                        real = slice(first, last + 1)
                        weights.append((last + 1 - first) * (scale * (k[real].mean(0) @ q[i])).exp()[None])
                        values.append(v[real].mean(0)[None])
                weight = torch.cat(weights)
                out[b, h, i] = weight @ torch.cat(values) / weight.sum()
    return out


CASES: list[tuple[Any, int, int, Any, Any]] = [  # config, q_len, kv_len, starts, lengths
    (SMALL, 300, 300, None, None),
    (SMALL, 129, 400, None, None),
    (SMALL, 330, 330, [0, 70], [300, 233]),
    (
        FlashPrefillConfig(alpha=0.9, sink_blocks=0, window_blocks=1, last_full_blocks=0, block_size=64),
        257,
        257,
        None,
        None,
    ),
    (StreamingLLMConfig(sink=0, window=100, block_size=128), 500, 500, None, [500, 390]),
]


def make(case: tuple) -> tuple[Tensor, Tensor, Tensor, BlockSelection]:
    config, q_len, kv_len, starts, lengths = case
    batch = 1 if starts is None and lengths is None else 2
    query, key = structured_qk(batch, 2, 1, q_len, kv_len, 32, seed=q_len)
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
    assert selection.density().mean() < 0.9
    return query, key, torch.randn_like(key), selection


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
def test_on_the_cpu_it_is_what_the_definition_says(case: tuple) -> None:
    query, key, value, selection = make(case)
    expected = by_definition(query, key, value, selection, 32**-0.5)
    out = block_sparse_attention(query, key, value, selection, mean_correction=True)
    real = (expected != 0).any(-1, keepdim=True)
    assert relative_error(out, expected, real) < 1e-5
    plain = block_sparse_attention(query, key, value, selection)
    assert relative_error(plain, expected, real) > 1e-2


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see below")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
def test_the_kernel_is_what_the_definition_says(case: tuple) -> None:
    from flexprefill_fa.kernels.mean_correction import correct

    query, key, value, selection = make(case)
    size, scale = selection.block_size, 32**-0.5
    keep = selection.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
    position = selection.grid.offset + torch.arange(query.shape[2])
    keys = torch.arange(key.shape[2])
    start, end = selection.ranges[:, :1], selection.ranges[:, 1:]
    mask = (keys <= position[:, None]) & ((keys >= start) & (keys < end))[:, None]
    mask = mask[:, None] & keep[:, :, : query.shape[2], : key.shape[2]]
    scores = (query @ key.repeat_interleave(2, 1).mT * scale).masked_fill(~mask, float("-inf"))
    out = scores.softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(2, 1)
    starts, lengths = selection.starts, selection.lengths
    got = correct(query, key, value, out, scores.logsumexp(-1), selection.lists, starts, lengths, scale, size)
    expected = by_definition(query, key, value, selection, scale)
    real = (expected != 0).any(-1, keepdim=True)
    assert torch.isfinite(got).all()
    assert relative_error(got, expected, real) < 1e-5


def test_rows_that_drop_nothing_are_unchanged() -> None:
    query, key = structured_qk(1, 2, 1, 300, 300, 32, seed=1)
    value = torch.randn_like(key)
    everything = FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64)
    out = sparse_prefill_attention(query, key, value, everything, backend="CPU", mean_correction=True)
    plain = sparse_prefill_attention(query, key, value, everything, backend="CPU")
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)


def test_one_call_selects_and_corrects() -> None:
    query, key, value, selection = make(CASES[0])
    out = sparse_prefill_attention(query, key, value, SMALL, mean_correction=True)
    expected = block_sparse_attention(query, key, value, selection, mean_correction=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    scaled = sparse_prefill_attention(query, key, value, SMALL, mean_correction=True, scale=0.5)
    kept = select_blocks(query, key, SMALL, scale=0.5)
    assert relative_error(scaled, by_definition(query, key, value, kept, 0.5), torch.ones(1)) < 1e-5


def test_it_lowers_the_error() -> None:
    """On heads whose dropped blocks hold a good part of the attention."""
    query, key = structured_qk(1, 4, 2, 700, 700, 32, seed=3)
    value = torch.randn_like(key) + 2.0 * torch.nn.functional.one_hot((torch.arange(700) // 100) % 32, 32)
    selection = select_blocks(query, key, dataclasses.replace(SMALL, gamma=0.3))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    plain, corrected = (
        relative_error(block_sparse_attention(query, key, value, selection, mean_correction=x), dense, torch.ones(1))
        for x in (False, True)
    )
    assert corrected < 0.8 * plain


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match=r"torch 2\.13 and newer, got torch 2\.11\.0"):
        check_mean_correction(True, None, None, torch.device("cpu"))
    check_mean_correction(False, None, None, torch.device("cpu"))


def test_what_it_cannot_be_combined_with() -> None:
    query, key, value, selection = make(CASES[0])

    def mod(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def score(score, b, h, q_idx, kv_idx):
        return score

    with pytest.raises(ValueError, match=r"cannot be combined with a mask_mod$"):
        sparse_prefill_attention(query, key, value, SMALL, mask_mod=mod, mean_correction=True)
    with pytest.raises(ValueError, match="cannot be combined with a mask_mod or a score_mod"):
        block_sparse_attention(query, key, value, selection, mask_mod=mod, score_mod=score, mean_correction=True)
    with pytest.raises(TypeError, match="mean_correction must be True or False, got str"):
        sparse_prefill_attention(query, key, value, SMALL, mean_correction="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="FLASH' cannot run"):
        resolve_backend("FLASH", query, 128, mean_correction=True)
    with pytest.raises(ValueError, match="runs on the CPU alone so far, got tensors on cuda:1"):
        check_mean_correction(True, None, None, torch.device("cuda:1"))


def by_masked_scores(query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """(fp64 output, real rows), all rows at once: the means as further columns of the scores."""
    size, blocks, heads = selection.block_size, selection.grid.kv_blocks, query.shape[1]
    q = query.double()
    k, v = (x.double().repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    scale, n = query.shape[3] ** -0.5, key.shape[2]
    position = selection.grid.offset + torch.arange(query.shape[2], device=query.device)
    keys = torch.arange(n, device=query.device)
    start, end = (x[:, None] for x in selection.ranges.long().unbind(1))
    real = (keys >= start) & (keys < end)  # [B, n]
    kept = selection.to_dense().repeat_interleave(size, 2)[:, :, : query.shape[2]]  # [B, Hq, Lq, nk]
    seen = (keys <= position[:, None]) & real[:, None, None] & kept.repeat_interleave(size, 3)[..., :n]
    scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))

    def per_block(values: Tensor) -> Tensor:
        masked = values * real[:, None, :, None]
        return torch.nn.functional.pad(masked, (0, 0, 0, blocks * size - n)).unflatten(2, (blocks, size)).sum(3)

    count = per_block(torch.ones_like(k[:, :1, :, :1]))  # [B, 1, nk, 1]
    last = torch.minimum(end, (torch.arange(blocks, device=query.device) + 1) * size) - 1  # [B, nk]
    dropped = ~kept & (count[:, :, None, :, 0] > 0) & (last[:, None, None] <= position[:, None])
    mean_key, mean_value = per_block(k) / count.clamp(min=1), per_block(v) / count.clamp(min=1)
    means = q @ mean_key.mT * scale + count.clamp(min=1).log().mT
    scores = torch.cat((scores, means.masked_fill(~dropped, float("-inf"))), -1)
    rows = ((position >= start) & (position < end))[:, None, :, None]
    return scores.softmax(-1).nan_to_num(0.0) @ torch.cat((v, mean_value), 2), rows


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
def test_masked_scores_are_the_definition(case: tuple) -> None:
    query, key, value, selection = make(case)
    got, real = by_masked_scores(query, key, value, selection)
    expected = by_definition(query, key, value, selection, 32**-0.5)
    assert relative_error(got, expected, real) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_on_the_gpu(dtype: torch.dtype, head_dim: int, padded: bool) -> None:
    """`correct` alone, on attention over the kept blocks that plain PyTorch computes."""
    from flexprefill_fa.kernels.mean_correction import correct

    query, key = (
        x.to("cuda", dtype) for x in structured_qk(2, 4, 2, 1000 if padded else 1301, 1301, head_dim, seed=head_dim)
    )
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [0, 300], "lengths": [1301, 900]} if padded else {}
    config = FlashPrefillConfig(alpha=0.3, window_blocks=1, last_full_blocks=0)
    selection = select_blocks(query, key, config, **place)
    assert selection.density().mean() < 0.9
    expected, real = by_masked_scores(query, key, value, selection)
    plain, low, _ = causal_oracle(query, key, value, selection)
    size, scale = selection.block_size, head_dim**-0.5
    keep = selection.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
    position = selection.grid.offset + torch.arange(query.shape[2], device="cuda")
    keys = torch.arange(key.shape[2], device="cuda")
    start, end = selection.ranges[:, :1], selection.ranges[:, 1:]
    mask = (keys <= position[:, None]) & ((keys >= start) & (keys < end))[:, None]
    mask = mask[:, None] & keep[:, :, : query.shape[2], : key.shape[2]]
    scores = (query.float() @ key.float().repeat_interleave(2, 1).mT * scale).masked_fill(~mask, float("-inf"))
    got = correct(
        query, key, value, low, scores.logsumexp(-1), selection.lists, selection.starts, selection.lengths, scale, size
    )
    assert torch.isfinite(got).all()
    assert relative_error(got, expected, real) < (1e-4 if dtype == torch.float32 else 1e-2)
    assert relative_error(plain, expected, real) > 2e-2
