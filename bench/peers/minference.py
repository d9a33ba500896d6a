"""github.com/microsoft/MInference: columns and diagonals by the last 64 queries, attention in Triton by 64 tokens."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Call, Peer

_LAST = 64  # queries


def _chosen(query: Tensor, key: Tensor, columns: int, diagonals: int) -> tuple[Tensor, Tensor]:
    """The best columns and diagonal offsets `[B, H, count]` by the last queries; the steps of its own selection."""
    length = query.shape[2]
    scores = query[:, :, -_LAST:] @ key.mT * query.shape[3] ** -0.5  # [B, H, 64, n]
    scores[..., -_LAST:].masked_fill_(torch.ones(_LAST, _LAST, device=query.device).triu(1).bool(), float("-inf"))
    shares = scores.softmax(-1, dtype=torch.float32)
    vertical = shares.sum(-2)
    vertical[..., :30] = float("inf")
    padded = torch.nn.functional.pad(shares, (_LAST, _LAST))  # a row shorter in memory: columns are diagonals
    batch, heads, rows, width = padded.shape
    sheared = padded.as_strided((batch, heads, rows, width - rows), (heads * rows * width, rows * width, width + 1, 1))
    slash = sheared.sum(-2)[..., 1 : length + 1]  # of the offset n - 1 - index
    slash[..., -100:] = float("inf")
    return vertical.topk(columns, -1).indices, length - 1 - slash.topk(diagonals, -1).indices


def _call(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    settings = {"vertical_size": config.vertical_size, "slash_size": config.slash_size}
    groups = query.shape[2] // key.shape[2]
    # As its models repeat them; not timed.
    keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2).contiguous() for x in (key, value))
    queries = query.transpose(1, 2).contiguous()
    columns, diagonals = (min(size, query.shape[1]) for size in settings.values())

    def select() -> tuple[Tensor, Tensor]:
        return _chosen(queries, keys, columns, diagonals)

    def run() -> Tensor:
        return module.vertical_slash_sparse_attention(queries, keys, values, *select())

    return Call(settings, run, lambda: (run().transpose(1, 2), None), select)


PEER = Peer(
    "MInference",
    "vertical_slash",
    "minference.ops.pit_sparse_flash_attention_v2",
    "vertical_slash_sparse_attention",
    _call,
)
