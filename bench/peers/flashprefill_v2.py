"""github.com/qhfan/FlashPrefillv2: one selection per kv head in Triton, attention in CUDA for Hopper.

A query tile there holds 128 rows of a kv head's query heads together, and its attention goes by 64 keys.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Attend, Call, Peer

_TILE = 128  # packed rows
_KEYS = 64


def _places(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of 128 tokens in their order, lengths of the keys and running lengths of the queries, all int32."""
    length = key.shape[1]
    numbers = partial(torch.tensor, dtype=torch.int32, device=query.device)
    return (
        torch.arange(length // 128, dtype=torch.int32, device=query.device)[None],
        numbers([length]),
        numbers([0, length]),
    )


def _call(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    settings = {"k_block_n": config.block_size, "abs_threshold": config.alpha, "attention_sink": config.sink_blocks}
    settings |= {"window_size": config.window_blocks, "last_n_blocks": config.last_full_blocks}
    prefill = module.FlashPrefill(k_block_m=_TILE, **settings)
    length = query.shape[1]
    pages, lengths, running = _places(query, key)
    paged = (query[0], key.view(-1, 128, *key.shape[2:]), value.view(-1, 128, *value.shape[2:]), pages)
    same = {"q_lens": [length], "max_cache_seqlen": length}  # without them it asks the GPU
    run = partial(prefill, *paged, lengths, running, **same)
    select = partial(prefill.index_select, paged[0], paged[1], pages, lengths, running, **same)

    def check() -> tuple[Tensor, float]:
        kept = int(select().block_sparse_cu[-1])
        rows = length * query.shape[2] // _TILE  # tiles of all kv heads together
        return run()[None], kept / (rows * (length // _KEYS))

    return Call(settings, run, check, select)


def _attend(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Attend:
    groups, length = query.shape[2] // key.shape[2], query.shape[1]
    tiles = 128 * groups // _TILE  # of the query heads of a kv head, in a block of queries
    mine = kept[0, ::groups].repeat_interleave(tiles, 1).repeat_interleave(128 // _KEYS, 2)  # [Hkv, tiles, keys / 64]
    first = torch.arange(mine.shape[1], device=query.device) * (_TILE // groups)
    last_row = first + _TILE // groups - 1
    mine &= torch.arange(mine.shape[2], device=query.device) * _KEYS <= last_row[:, None]
    running = mine.sum(-1).flatten().cumsum(0).int()
    settings: dict[str, Any] = {
        "block_sparse_cu": torch.cat((running.new_zeros(1), running)),
        "block_sparse_idx": mine.nonzero()[:, 2].int(),
        "total_q_tiles": mine.shape[1],
        "cu_q_tiles": running.new_tensor([0, mine.shape[1]]),
    }
    pages, lengths, cu_seqlens = _places(query, key)
    paged = (key.view(-1, 128, *key.shape[2:]), value.view(-1, 128, *value.shape[2:]))
    settings |= {"page_table": pages, "cache_seqlens": lengths, "cu_seqlens_q": cu_seqlens, "max_seqlen_q": length}

    def run() -> Tensor:
        return module.flash_attn_with_kvcache(query[0], *paged, causal=True, num_splits=1, **settings)[None]

    return run


PEER = Peer("FlashPrefill V2", "flashprefill", "flashprefill.prefill", "FlashPrefill", _call, _attend)
