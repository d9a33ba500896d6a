"""github.com/flashinfer-ai/flashinfer: attention over given blocks alone, one map per kv head; FA3's kernel on Hopper.

The kept keys of a block of queries are gathered token by token in their order. That block's own keys come last, so that
a causal mask aligned to the end of what is gathered is the mask of the prompt. `plan` makes the lists on the CPU and is
not timed; `run` is, with the copies of queries and outputs by kv head that it makes itself.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bench.peers.base import Attend, Peer

_WORKSPACE = 128 << 20  # bytes, as it recommends


def _attend(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Attend:
    batch, length, heads, dim = query.shape
    groups = heads // key.shape[2]
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))  # [B H, L, D]
    blocks = kept[:, ::groups].flatten(0, 1)  # [B Hkv, nq, nk]
    sizes = torch.full(blocks.shape[:2], 128, dtype=torch.int32, device=query.device)
    sizes[:, -1] = length - 128 * (blocks.shape[1] - 1)
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = module.VariableBlockSparseAttentionWrapper(workspace)
    wrapper.plan(blocks, sizes, sizes, len(queries), len(keys), dim, causal=True, q_data_type=query.dtype)

    def run() -> Tensor:
        return wrapper.run(queries, keys, values).unflatten(0, (batch, heads)).transpose(1, 2)

    return run


PEER = Peer("FlashInfer", None, "flashinfer.sparse", "VariableBlockSparseAttentionWrapper", None, _attend)
