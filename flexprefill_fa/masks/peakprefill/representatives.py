"""Representatives of a block's keys in plain PyTorch: vectors, and what each adds to a score.

A key block is seen through R vectors r_i. Vector i stands for w_i of the block's real keys and, if asked for, for how
far they lie from it:

    bias_i = ln w_i + s^2 / 2  sum_c  E[q_c^2] Var_i[k_c]

The second term is what a spread of the keys adds to the logarithm of a sum of exponentials, to second order and for a
mean query: one number a representative, so that scores cost no more with it. E[q_c^2] is the mean over the queries of
all heads of the key head at every 16th position, the last real query among them. Distances are Euclidean. Everything
is fp32, vectors are rounded to the inputs' dtype in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from flexprefill_fa.masks.element import Element

if TYPE_CHECKING:
    from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig

CLUSTER_STEPS = 3
"""Rounds in which keys move to the nearest centre and centres to their keys' mean (Lloyd's algorithm)."""
QUERY_STEP = 16
"""Positions from one query to the next in E[q^2]."""
BY_LENGTH = (8, 4, 65536)
"""Representatives of a block for batches of up to so many positions, and for longer ones, where they cost more to score
than the blocks that they spare."""


def count_of(config: PeakPrefillConfig, kv_len: int) -> int:
    """Representatives of a block in a batch of this many positions, padding included."""
    most, fewest, longest = BY_LENGTH
    return config.per_block or (most if kv_len <= longest else fewest)


def representatives(element: Element, config: PeakPrefillConfig) -> tuple[Tensor, Tensor]:
    """r `[Hkv, nk, R, D]` in the inputs' dtype, and biases fp32 `[Hkv, nk, R]`, minus infinity where w is 0."""
    size = config.block_size
    keys = rearrange(element.key_slots().float(), "h (j b) d -> h j b d", b=size)
    real = rearrange(element.real_keys, "(j b) -> j b", b=size)[..., None]
    centre = keys.sum(2, keepdim=True) / real.sum(1, keepdim=True)
    keys = (keys - centre) * real  # from the block's mean on, so that differences of squares are exact enough
    real = real[..., 0].expand(keys.shape[:3])
    count = count_of(config, element.grid.batch_keys)
    member = (_clusters if config.representatives == "clusters" else _outliers)(keys, real, count)
    number = member.sum(-1)  # [Hkv, nk, R]
    mean = _means(keys, member)
    bias = number.log()
    if config.variance:
        variance = (_means(keys.square(), member) - mean.square()).clamp(min=0)
        spread = torch.einsum("hjrd,hd->hjr", variance, mean_square_query(element))
        bias = bias + 0.5 * element.scale**2 * spread
    return torch.where(number[..., None] > 0, mean + centre, 0.0).to(element.key.dtype), bias


def mean_square_query(element: Element) -> Tensor:
    """E[q_c^2], fp32 `[Hkv, D]`."""
    last = element.grid.queries - 1
    some = element.query[:, last % QUERY_STEP :: QUERY_STEP].float()
    return rearrange(some, "(h g) m d -> h (g m) d", g=element.groups).square().mean(1)


def _clusters(keys: Tensor, real: Tensor, count: int) -> Tensor:
    """Which keys belong to which of R clusters, fp32 0 or 1 `[Hkv, nk, R, B]`; keys less the mean of their block.

    Seeds: the key farthest from the mean, then each time the key farthest from the mean and all seeds. A seed at
    distance 0 stands for nothing: equal keys make one cluster. Among equals the lower position, or cluster, is taken.
    """
    nearest = keys.square().sum(-1)
    seeds, used = [], []
    for seed in range(count):
        far = nearest.masked_fill(~real, -1.0)
        farthest = far.amax(-1, keepdim=True)
        place = _first(far == farthest)
        used.append(farthest > 0 if seed else torch.ones_like(farthest, dtype=torch.bool))
        seeds.append(keys.gather(2, place[..., None, None].expand(*place.shape, 1, keys.shape[-1])))
        nearest = torch.minimum(nearest, (keys - seeds[-1]).square().sum(-1))
    centres, unused = torch.cat(seeds, 2), ~torch.cat(used, 2)
    for _ in range(CLUSTER_STEPS):
        member = _members(keys, real, centres, unused)
        centres = torch.where(member.sum(-1, keepdim=True) > 0, _means(keys, member), centres)
    return _members(keys, real, centres, unused)


def _outliers(keys: Tensor, real: Tensor, count: int) -> Tensor:
    """The same for all keys but R - 1, and for those R - 1 farthest from the mean, the lower position first."""
    distance = keys.square().sum(-1).masked_fill(~real, -1.0)
    order = distance.sort(dim=-1, descending=True, stable=True).indices[..., : count - 1]
    alone = torch.zeros(*keys.shape[:2], count - 1, keys.shape[2], device=keys.device)
    alone = alone.scatter(-1, order[..., None], 1.0) * real[:, :, None]
    return torch.cat((real[:, :, None] * (1 - alone.sum(2, keepdim=True)), alone), 2)


def _means(values: Tensor, member: Tensor) -> Tensor:
    """`[Hkv, nk, R, D]`: the mean over each cluster's members, 0 for none."""
    return member @ values / member.sum(-1, keepdim=True).clamp(min=1)


def _members(keys: Tensor, real: Tensor, centres: Tensor, unused: Tensor) -> Tensor:
    """Each real key with its nearest centre."""
    distance = centres.square().sum(-1, keepdim=True) - 2 * centres @ keys.mT  # less the key's own square
    distance = distance.masked_fill(unused[..., None], torch.inf)
    cluster = _first((distance == distance.amin(2, keepdim=True)).transpose(2, 3))
    return (cluster[:, :, None] == torch.arange(centres.shape[2], device=keys.device)[:, None]) * real[
        :, :, None
    ].float()


def _first(true: Tensor) -> Tensor:
    """Index of the first true item of the last dimension."""
    return true.to(torch.int8).argmax(-1)
