"""Mean correction by its definition, token by token and all rows at once in fp64, and inputs that need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import BlockSelection, FlashPrefillConfig, FlexPrefillConfig, StreamingLLMConfig, select_blocks
from flexprefill_fa.mean_correction import MeanCorrection

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


def opposed(length: int, head_dim: int, last: int) -> tuple[Tensor, Tensor]:
    """Queries whose last `last` keys score some 120 below all the others."""
    axis = torch.nn.functional.one_hot(torch.tensor(0), head_dim) * 60.0 * head_dim**0.5
    query = torch.randn(1, 2, length, head_dim) * 0.1 + axis / 60.0**0.5
    sign = torch.where(torch.arange(length) < length - last, 1.0, -1.0)[:, None]
    return query, torch.randn(1, 1, length, head_dim) * 0.1 + sign * axis / (60.0 * head_dim) ** 0.5


WINDOW = StreamingLLMConfig(sink=0, window=100, block_size=64)
