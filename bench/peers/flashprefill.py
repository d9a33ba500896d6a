"""github.com/qhfan/FlashPrefill: FlashPrefill as published, all of it in Triton."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.peers.base import Attend, Call, Peer


class _Nothing:
    """In the place of a kernel: launches nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: None


def _call(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    out = torch.empty_like(query)
    settings = {"block_size": config.block_size, "attention_sink": config.sink_blocks, "alpha": config.alpha}
    settings |= {"window_size": config.window_blocks, "last_n_block_full": config.last_full_blocks}
    settings["min_budget"] = 0  # blocks; the paper has no such setting
    run = partial(module.flash_prefill, query, key, value, out, **settings)

    def check() -> tuple[Tensor, None]:
        out.fill_(float("nan"))  # what it leaves out must not look right
        run()
        return out, None

    def select() -> None:
        with mock.patch.object(module, "_flash_forward", _Nothing()):
            run()

    return Call(settings, run, check, select)


def _attend(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Attend:
    out = torch.full_like(query, float("nan"))
    batch, length, heads, dim = query.shape
    width = kept.shape[-1]
    numbers = torch.arange(width, device=query.device).expand(kept.shape)
    blocks = numbers.masked_fill(~kept, width).sort(-1).values.permute(0, 2, 3, 1).contiguous()  # [B, nq, nk, H]
    counts = kept.sum(-1).int().transpose(1, 2).contiguous()  # [B, nq, H]
    strides = [stride for tensor in (query, key, value, out, blocks, counts) for stride in tensor.stride()]

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return -(-length // meta["Q_TILE_SIZE"]), batch * heads, 1

    def run() -> Tensor:
        tensors = (query, key, value, out, blocks, counts)
        sizes = (length, length, heads, key.shape[2])
        module._flash_forward[grid](*tensors, dim**-0.5, *strides, *sizes, BLOCK_SIZE=128, D_HEAD=dim)
        return out

    return run


PEER = Peer("FlashPrefill", "flashprefill", "ops.flashprefill_native_forward", "flash_prefill", _call, _attend)
