"""Compiled FlexAttention for the tests, and the count of graphs that a process has compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def _attend(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Any:
    return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=query.shape[1] != key.shape[1])


_compiled = torch.compile(_attend, fullgraph=True, dynamic=False)


def compiled_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
    """What a user does with a BlockMask; a graph for every set of shapes."""
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        return _compiled(query, key, value, block_mask)


def graphs() -> int:
    """Graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def sdpa_error(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, exact: Tensor) -> float:
    """Largest error of torch's own SDPA in the inputs' precision against an exact output, with the same mask.

    mask: bool `[B, Hq, Lq, Lkv]`; rows without a True are left out.
    """
    rows = mask.any(-1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | ~rows[..., None], scale=scale, enable_gqa=True
    )
    return float((out.double() - exact).abs()[rows].max())
