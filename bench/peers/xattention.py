"""github.com/mit-han-lab/x-attention with Block-Sparse-Attention: scores in Triton, attention in CUDA."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Attend, Call, Peer


def _call(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    settings = {"stride": config.stride, "threshold": config.threshold, "keep_sink": True, "keep_recent": True}
    groups, length = query.shape[2] // key.shape[2], query.shape[1]
    # It wants as many key heads as query heads, as its models repeat them; not timed.
    heads = [x.transpose(1, 2).contiguous() for x in (query, *(y.repeat_interleave(groups, 2) for y in (key, value)))]
    run = partial(module.Xattention_prefill, *heads, block_size=128, **settings)
    longest = 1 << (length - 1).bit_length()
    chunk = max(min(max(2048, longest), 128 * 1024 * 2048 // longest), 2048)  # as its own call chooses it
    select = partial(module.xattn_estimate, *heads[:2], block_size=128, chunk_size=chunk, **settings)

    def check() -> tuple[Tensor, float]:
        blocks = -(-length // 128)
        kept = select()[1][:, :, :blocks, :blocks].tril().sum().item()
        return run().transpose(1, 2), kept / (query.shape[2] * blocks**2)

    return Call(settings, run, check, select)


def _attend(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Attend:
    length, heads = query.shape[1:3]
    ends = torch.tensor([0, length], dtype=torch.int32, device=query.device)
    sparse = torch.ones(heads, dtype=torch.int32, device=query.device)
    attend = partial(module.block_sparse_attn_func, query[0], key[0], value[0], ends, ends, sparse, None, kept)

    def run() -> Tensor:
        return attend(length, length, 0.0, deterministic=True, is_causal=True)[None]

    return run


PEER = Peer("XAttention", "xattention", "xattn.src.Xattention", "Xattention_prefill", _call, _attend)
