"""github.com/bytedance/FlexPrefill: FlexPrefill as published, with a Triton kernel over lists of blocks."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.peers.base import Attend, Call, Peer


def _call(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, config: Any) -> Call:
    if config.variant != "published":  # the function has no name for it
        raise ValueError(f"it selects the variant 'published', got settings of the variant {config.variant!r}")
    settings = {name: getattr(config, name) for name in ("gamma", "tau", "min_budget", "max_budget", "block_size")}
    run = partial(module.flex_prefill_attention, query, key, value, **settings)
    size = config.block_size
    least, most = (-(-budget // size) for budget in (config.min_budget, config.max_budget or 2**31 - 1))
    select = partial(module.get_active_blocks, query, key, value, size, config.gamma, least, most, config.tau)
    dense = query.shape[1] <= config.dense_tokens
    return Call(settings, run, partial(run, return_computational_ratio=True), None if dense else select)


def _attend(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Attend:
    blocks = [[head.flatten().nonzero()[:, 0] for head in element] for element in kept]  # as its selection gives them
    return partial(module.triton_block_wise_attention, query, key, value, blocks, 128)


PEER = Peer(
    "FlexPrefill", "flexprefill", "flex_prefill.ops.flex_prefill_attention", "flex_prefill_attention", _call, _attend
)
