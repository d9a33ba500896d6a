"""Mean correction against its definition, token by token in fp64: by FlexAttention on the CPU, and in Triton."""

from __future__ import annotations

import dataclasses
from typing import Any

import needs
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
from flexprefill_fa.backends import flash_problem
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.validation import check_mean_correction

HAS_GPU = torch.cuda.is_available()
SMALL = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=64, block_size=64)


KINDS: list[MeanCorrection] = [True, "tilted"]


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, scale: float, kind: MeanCorrection = True
) -> Tensor:
    """fp64 [B, Hq, Lq, D]; rows of padded queries are 0."""
    size, keep = selection.block_size, selection.to_dense()
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for b, (start, end) in enumerate(selection.ranges.tolist()):
        for h in range(query.shape[1]):
            q, k, v = (x.double() for x in (query[b, h], key[b, h // groups], value[b, h // groups]))
            anchors = torch.zeros(selection.grid.kv_blocks, query.shape[3], dtype=torch.float64)
            for block in range(selection.grid.kv_blocks if kind == "tilted" else 0):
                behind = [  # the real queries of query blocks that begin behind this key block
                    r
                    for r in range(query.shape[2])
                    if start <= selection.grid.offset + r < end
                    and (selection.grid.offset + r // size * size) // size > block
                ]
                anchors[block] = q[behind].mean(0) if behind else 0.0
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
                        anchor = anchors[block]
                        share = (scale * (k[real] @ anchor)).exp()
                        mean = share / share.sum() @ k[real]
                        weights.append((share.sum() * (scale * (mean @ (q[i] - anchor))).exp())[None])
                        values.append((share / share.sum() @ v[real])[None])
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
@needs.mean_correction
def test_on_the_cpu_it_is_what_the_definition_says(case: tuple, kind: MeanCorrection) -> None:
    query, key, value, selection = make(case)
    expected = by_definition(query, key, value, selection, 32**-0.5, kind)
    out = block_sparse_attention(query, key, value, selection, mean_correction=kind)
    real = (expected != 0).any(-1, keepdim=True)
    assert relative_error(out, expected, real) < 1e-5
    plain = block_sparse_attention(query, key, value, selection)
    assert relative_error(plain, expected, real) > 1e-2


def corrected_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, kind: MeanCorrection = True
) -> Tensor:
    """`correct` on attention over the kept blocks that plain PyTorch computes."""
    from flexprefill_fa.kernels.mean_correction import correct

    size, scale, groups = selection.block_size, query.shape[3] ** -0.5, query.shape[1] // key.shape[1]
    keep = selection.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
    position = selection.grid.offset + torch.arange(query.shape[2], device=query.device)
    keys = torch.arange(key.shape[2], device=query.device)
    start, end = selection.ranges[:, :1], selection.ranges[:, 1:]
    mask = (keys <= position[:, None]) & ((keys >= start) & (keys < end))[:, None]
    mask = mask[:, None] & keep[:, :, : query.shape[2], : key.shape[2]]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    scores = (query.float() @ k.mT * scale).masked_fill(~mask, float("-inf"))
    out = (scores.softmax(-1).nan_to_num(0.0) @ v).to(query.dtype)
    starts, lengths, tilted = selection.starts, selection.lengths, kind == "tilted"
    return correct(query, key, value, out, scores.logsumexp(-1), selection.lists, starts, lengths, scale, size, tilted)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see below")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
def test_the_kernel_is_what_the_definition_says(case: tuple, kind: MeanCorrection) -> None:
    query, key, value, selection = make(case)
    scale = 32**-0.5
    got = corrected_by_kernel(query, key, value, selection, kind)
    expected = by_definition(query, key, value, selection, scale, kind)
    real = (expected != 0).any(-1, keepdim=True)
    assert torch.isfinite(got).all()
    assert relative_error(got, expected, real) < 1e-5


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see below")
def test_the_kernel_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and index chunks so small that each of them has a second one."""
    from flexprefill_fa.kernels import mean_correction as kernel

    monkeypatch.setattr(kernel, "launch_options", lambda *_: {"ROWS": 64, "COLUMNS": 16, "STAGES": 1, "num_warps": 4})
    monkeypatch.setattr("flexprefill_fa.kernels.kept_map.CHUNK", 4)
    query, key = structured_qk(1, 2, 1, 140, 3300, 32, seed=7)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, SMALL)
    assert (selection.kv_num_blocks + selection.full_kv_num_blocks).max() > 4  # an index chunk
    got = corrected_by_kernel(query, key, value, selection)
    assert relative_error(got, by_masked_scores(query, key, value, selection)[0], torch.ones(1)) < 1e-5
    query, key = opposed(700, 32, last=300)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, WINDOW)
    got = corrected_by_kernel(query, key, value, selection)
    assert relative_error(got, by_masked_scores(query, key, value, selection)[0], torch.ones(1)) < 1e-5


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see below")
def test_the_kernel_reads_nothing_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, selection = make(CASES[2])
    expected = corrected_by_kernel(query, key, value, selection)
    clean, clean_like = torch.empty, torch.empty_like

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(clean(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(clean_like(*a, **k)))
    assert torch.equal(corrected_by_kernel(query, key, value, selection), expected)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see below")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_rows_that_keep_nothing(shift: float, kind: MeanCorrection) -> None:
    """Their means alone count, at whatever scores: an emptied row block has no norm to be relative to."""
    query, key = structured_qk(1, 2, 1, 400, 400, 32, seed=2)
    query[..., 0], key[..., 0] = 1.0, shift * 32**0.5
    value = torch.randn_like(key)
    selection = select_blocks(query, key, SMALL)
    selection.kv_num_blocks[:, :, 4] = selection.full_kv_num_blocks[:, :, 4] = 0
    expected = by_masked_scores(query, key, value, selection, kind)[0]
    assert relative_error(corrected_by_kernel(query, key, value, selection, kind), expected, torch.ones(1)) < 1e-4


def opposed(length: int, head_dim: int, last: int) -> tuple[Tensor, Tensor]:
    """Queries whose last `last` keys score some 120 below all the others."""
    axis = torch.nn.functional.one_hot(torch.tensor(0), head_dim) * 60.0 * head_dim**0.5
    query = torch.randn(1, 2, length, head_dim) * 0.1 + axis / 60.0**0.5
    sign = torch.where(torch.arange(length) < length - last, 1.0, -1.0)[:, None]
    return query, torch.randn(1, 1, length, head_dim) * 0.1 + sign * axis / (60.0 * head_dim) ** 0.5


WINDOW = StreamingLLMConfig(sink=0, window=100, block_size=64)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernel runs there, see below")
def test_dropped_blocks_that_outweigh_all_kept_ones() -> None:
    """Beyond the range of weights relative to the kept blocks' norm: what the second way through is for."""
    query, key = opposed(400, 32, last=200)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, WINDOW)
    got = corrected_by_kernel(query, key, value, selection)
    assert relative_error(got, by_definition(query, key, value, selection, 32**-0.5), torch.ones(1)) < 1e-5


@needs.mean_correction
def test_rows_that_drop_nothing_are_unchanged() -> None:
    query, key = structured_qk(1, 2, 1, 300, 300, 32, seed=1)
    value = torch.randn_like(key)
    everything = FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64)
    out = sparse_prefill_attention(query, key, value, everything, backend="CPU", mean_correction=True)
    plain = sparse_prefill_attention(query, key, value, everything, backend="CPU")
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 128])
@needs.mean_correction
def test_one_call_for_a_padded_batch(size: int, kind: MeanCorrection) -> None:
    config = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=64, block_size=size)
    query, key = structured_qk(2, 4, 2, 600, 600, 32, seed=5)
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [0, 70], "lengths": [600, 500]}
    out, selection = sparse_prefill_attention(
        query, key, value, config, mean_correction=kind, return_selection=True, backend="CPU", **place
    )
    expected, real = by_masked_scores(query, key, value, selection, kind)
    assert relative_error(out, expected, real) < 1e-5
    plain = sparse_prefill_attention(query, key, value, config, backend="CPU", **place)
    assert relative_error(plain, expected, real) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@needs.mean_correction
def test_padded_queries_may_be_anything(kind: MeanCorrection, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = structured_qk(1, 2, 1, 300, 300, 32, seed=4)
    value = torch.randn_like(key)
    place: dict[str, Any] = {"starts": [90], "lengths": [210], "mean_correction": kind}
    expected = sparse_prefill_attention(query, key, value, SMALL, **place)
    query[:, :, :90] = torch.nan
    out = sparse_prefill_attention(query, key, value, SMALL, **place)
    torch.testing.assert_close(out[:, :, 90:], expected[:, :, 90:])
    with torch.compiler.set_stance("force_eager"):
        out = sparse_prefill_attention(query, key, value, SMALL, **place)
    torch.testing.assert_close(out[:, :, 90:], expected[:, :, 90:], atol=1e-5, rtol=1e-4)


@needs.mean_correction
def test_more_than_one_block_of_means() -> None:
    query, key = structured_qk(1, 2, 1, 130, 5000, 32, seed=6)
    value = torch.randn_like(key)
    selection = select_blocks(query, key, SMALL)
    out = block_sparse_attention(query, key, value, selection, mean_correction=True)
    assert relative_error(out, by_masked_scores(query, key, value, selection)[0], torch.ones(1)) < 1e-5


@needs.mean_correction
def test_one_call_selects_and_corrects() -> None:
    query, key, value, selection = make(CASES[0])
    out = sparse_prefill_attention(query, key, value, SMALL, mean_correction=True)
    expected = block_sparse_attention(query, key, value, selection, mean_correction=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    scaled = sparse_prefill_attention(query, key, value, SMALL, mean_correction=True, scale=0.5)
    kept = select_blocks(query, key, SMALL, scale=0.5)
    assert relative_error(scaled, by_definition(query, key, value, kept, 0.5), torch.ones(1)) < 1e-5


@needs.mean_correction
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


def test_an_older_torch_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ValueError, match=r"torch 2\.13 and newer, got torch 2\.11\.0"):
        check_mean_correction(True, None, None, torch.device("cpu"))
    check_mean_correction(False, None, None, torch.device("cpu"))
    check_mean_correction(True, None, None, torch.device("cuda:1"))


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
    with pytest.raises(ValueError, match="mean_correction must be True, False or 'tilted', got 'yes'"):
        sparse_prefill_attention(query, key, value, SMALL, mean_correction="yes")  # pyright: ignore[reportArgumentType]


def by_masked_scores(
    query: Tensor, key: Tensor, value: Tensor, selection: BlockSelection, kind: MeanCorrection = True
) -> tuple[Tensor, Tensor]:
    """(fp64 output, real rows), all rows at once: what stands for blocks as further columns of the scores."""
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
    rows = ((position >= start) & (position < end))[:, None, :, None]
    share = torch.ones_like(k[..., :1])
    anchor = torch.zeros_like(k[:, :, :blocks])
    if kind == "tilted":
        begins = (position[::size] // size).repeat_interleave(size)[: len(position)]
        behind = (begins > torch.arange(blocks, device=query.device)[:, None])[None, None] & rows.mT  # [B, 1, nk, Lq]
        anchor = behind.double() @ q / behind.sum(-1, keepdim=True).clamp(min=1)
        share = (k * anchor.repeat_interleave(size, 2)[:, :, :n] * scale).sum(-1, keepdim=True).exp()
    total = per_block(share).clamp(min=1e-300)
    mean_key, mean_value = per_block(k * share) / total, per_block(v * share) / total
    means = q @ mean_key.mT * scale + (total.log() - scale * (mean_key * anchor).sum(-1, keepdim=True)).mT
    scores = torch.cat((scores, means.masked_fill(~dropped, float("-inf"))), -1)
    return scores.softmax(-1).nan_to_num(0.0) @ torch.cat((v, mean_value), 2), rows


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("kind", KINDS)
def test_masked_scores_are_the_definition(case: tuple, kind: MeanCorrection) -> None:
    query, key, value, selection = make(case)
    got, real = by_masked_scores(query, key, value, selection, kind)
    expected = by_definition(query, key, value, selection, 32**-0.5, kind)
    assert relative_error(got, expected, real) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_on_the_gpu(dtype: torch.dtype, head_dim: int, padded: bool, kind: MeanCorrection) -> None:
    query, key, value, selection = on_the_gpu(dtype, head_dim, padded)
    expected, real = by_masked_scores(query, key, value, selection, kind)
    got = corrected_by_kernel(query, key, value, selection, kind)
    assert torch.isfinite(got).all()
    plain, _, _ = causal_oracle(query, key, value, selection)
    allowed = 1e-4 if dtype == torch.float32 else 5e-3
    assert relative_error(got, expected, real) < allowed < relative_error(plain, expected, real) / 2


def on_the_gpu(dtype: torch.dtype, head_dim: int, padded: bool) -> tuple[Tensor, Tensor, Tensor, BlockSelection]:
    n = 5001  # 40 blocks: more than a tile of means
    query, key = (
        x.to("cuda", dtype) for x in structured_qk(2, 4, 2, 1000 if padded else n, n, head_dim, seed=head_dim)
    )
    place: dict[str, Any] = {"starts": [0, 300], "lengths": [n, n - 401]} if padded else {}
    selection = select_blocks(query, key, FlashPrefillConfig(alpha=0.3, window_blocks=1, last_full_blocks=0), **place)
    assert selection.density().mean() < 0.9
    return query, key, torch.randn_like(key), selection


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["TRITON", "FLASH"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_correction_on_the_gpu(
    dtype: torch.dtype, head_dim: int, padded: bool, backend: str, kind: MeanCorrection
) -> None:
    """The whole call: a wrong log-sum-exp from either kernel would show."""
    query, key, value, selection = on_the_gpu(dtype, head_dim, padded)
    if backend == "FLASH" and (problem := flash_problem(query, 128)):
        pytest.skip(problem)
    expected, real = by_masked_scores(query, key, value, selection, kind)
    out = block_sparse_attention(query, key, value, selection, mean_correction=kind, backend=backend)
    plain = block_sparse_attention(query, key, value, selection, backend=backend)
    assert relative_error(out, expected, real) < 5e-3 < relative_error(plain, expected, real) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dropped_blocks_that_outweigh_all_kept_ones_on_the_gpu(dtype: torch.dtype) -> None:
    query, key = (x.to("cuda", dtype) for x in opposed(1000, 64, last=500))
    value = torch.randn_like(key)
    selection = select_blocks(query, key, WINDOW)
    expected, real = by_masked_scores(query, key, value, selection)
    got = corrected_by_kernel(query, key, value, selection)
    # At scores of some 60 the rounding of the mean keys shows: 2 ** -9 of it moves a weight by a tenth.
    assert relative_error(got, expected, real) < {torch.float32: 1e-3, torch.float16: 2e-2}.get(dtype, 0.15)
