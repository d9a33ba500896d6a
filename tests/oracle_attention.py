"""Exact attention in float64 over all pairs of tokens, or those in kept blocks: the oracle for recall and outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from oracle_grid import padding


def _visible(n_batch: int, lq: int, lkv: int, starts, lengths) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal and real (query, key) pairs, bool `[B, 1, Lq, Lkv]`, and real queries, bool `[B, 1, Lq]`."""
    starts, lengths = padding(n_batch, lkv, starts, lengths)
    start = torch.tensor(starts)[:, None]
    end = start + torch.tensor(lengths)[:, None]
    k_pos = torch.arange(lkv)
    q_pos = k_pos[lkv - lq :]
    real_k = (k_pos >= start) & (k_pos < end)
    real_q = real_k[:, lkv - lq :]
    pairs = real_q[:, :, None] & real_k[:, None, :] & (k_pos[None, :] <= q_pos[:, None])
    return pairs[:, None], real_q[:, None]


def _token_mask(keep: np.ndarray | torch.Tensor, block_size: int, lq: int, lkv: int) -> torch.Tensor:
    """Block cells bool `[B, Hq, nq, nk]` as token pairs bool `[B, Hq, Lq, Lkv]`."""
    cells = torch.as_tensor(keep).cpu()
    return cells.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)[:, :, :lq, :lkv]


def _probabilities(query, key, mask: torch.Tensor, scale: float | None) -> torch.Tensor:
    """float64 softmax over the pairs in mask, `[B, Hq, Lq, Lkv]`; rows without a pair are zero."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k = query.detach().cpu().to(torch.float64), key.detach().cpu().to(torch.float64)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (scale * q @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    return torch.softmax(logits, -1).masked_fill(~mask, 0.0)  # an empty row is NaN before the fill


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Exact causal attention over real keys, float64 `[B, Hq, Lq, Lkv]`; rows of padded queries are zero."""
    pairs, _ = _visible(query.shape[0], query.shape[2], key.shape[2], starts, lengths)
    return _probabilities(query, key, pairs, scale)


def recall(
    probabilities: torch.Tensor,
    keep: np.ndarray | torch.Tensor,
    block_size: int,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Share of the probability in kept blocks, mean over real rows: float64 `[B, Hq]`, NaN without a real row.

    probabilities `[B, Hq, Lq, Lkv]` from `attention_probabilities`; keep `[B, Hq, nq, nk]`.
    """
    n_batch, _, lq, lkv = probabilities.shape
    _, real_q = _visible(n_batch, lq, lkv, starts, lengths)
    per_row = (probabilities * _token_mask(keep, block_size, lq, lkv)).sum(-1)
    return (per_row * real_q).sum(-1) / real_q.sum(-1)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: np.ndarray | torch.Tensor,
    block_size: int,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Causal attention over real keys in kept blocks, float64 `[B, Hq, Lq, D]`; rows that see nothing are zero.

    query `[B, Hq, Lq, D]`, key and value `[B, Hkv, Lkv, D]`, keep `[B, Hq, nq, nk]`.
    """
    lq, lkv = query.shape[2], key.shape[2]
    pairs, _ = _visible(query.shape[0], lq, lkv, starts, lengths)
    p = _probabilities(query, key, pairs & _token_mask(keep, block_size, lq, lkv), scale)
    v = value.detach().cpu().to(torch.float64)
    return p @ v.repeat_interleave(query.shape[1] // v.shape[1], 1)
