"""github.com/thu-ml/SpargeAttn: block means and their likeness, attention in int8 and fp8.

Its attention is launched on CUDA's default stream, whichever is torch's current one.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.peers.base import Attend, Call, Peer

_SETTINGS = {"simthreshd1": 0.6, "cdfthreshd": 0.98, "pvthreshd": 50, "is_causal": True}  # its own, but causal


def _call(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    groups = query.shape[2] // key.shape[2]
    heads = [x.transpose(1, 2).contiguous() for x in (query, *(y.repeat_interleave(groups, 2) for y in (key, value)))]
    run = partial(module.spas_sage2_attn_meansim_cuda, *heads, **_SETTINGS)
    mean = heads[1].mean(-2, keepdim=True)
    same = {name: _SETTINGS[name] for name in ("simthreshd1", "cdfthreshd", "is_causal")}
    select = partial(
        module.get_block_map_meansim_fuse_quant, *heads[:2], mean, return_lut=True, BLKQ=64, BLKK=128, **same
    )

    def check() -> tuple[Tensor, float]:
        kept = select()[1].sum().item()
        return run().transpose(1, 2), kept / (query.shape[2] * (query.shape[1] // 64) * (query.shape[1] // 128))

    return Call(dict(_SETTINGS), run, check, select)


def _attend(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Attend:
    heads = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    blocks = kept.repeat_interleave(2, 2).contiguous()  # its query blocks on Hopper are of 64 tokens

    def run() -> Tensor:
        return module.block_sparse_sage2_attn_cuda(*heads, mask_id=blocks).transpose(1, 2)

    return run


PEER = Peer(
    "SpargeAttn",
    None,
    "spas_sage_attn.core",
    "spas_sage2_attn_meansim_cuda",
    _call,
    _attend,
    on_current_stream=False,
)
