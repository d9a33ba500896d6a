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
BY_LENGTH = (8, 4, 32768)
"""Representatives of a block in sequences of up to so many keys, and in longer ones, where they cost more to score than
the blocks that they spare."""


def count_of(config: PeakPrefillConfig, keys: int) -> int:
    """Representatives of a block of a sequence with so many keys, from its first block on."""
    most, fewest, longest = BY_LENGTH
    return config.per_block or (most if keys <= longest else fewest)


def representatives(element: Element, config: PeakPrefillConfig) -> tuple[Tensor, Tensor]:
    """r `[Hkv, nk, R, D]` in the inputs' dtype, and biases fp32 `[Hkv, nk, R]`, minus infinity where w is 0."""
    size = config.block_size
    keys = rearrange(element.key_slots().float(), "h (j b) d -> h j b d", b=size)
    real = rearrange(element.real_keys, "(j b) -> j b", b=size).expand(keys.shape[:3])
    members_of = _clusters if config.representatives == "clusters" else _outliers
    member = members_of(keys, real, count_of(config, element.grid.keys))
    count = member.sum(-1)  # [Hkv, nk, R]
    mean = member @ keys / count.clamp(min=1)[..., None]
    bias = count.log()
    if config.variance:
        squares = mean_square_query(element)
        spread = [  # one representative at a time: all differences would be R times the keys
            _mean((keys - r[:, :, None]).square(), m) for r, m in zip(mean.unbind(2), member.unbind(2), strict=True)
        ]
        bias = bias + 0.5 * element.scale**2 * torch.stack([torch.einsum("hjd,hd->hj", v, squares) for v in spread], -1)
    return mean.to(element.key.dtype), bias


def mean_square_query(element: Element) -> Tensor:
    """E[q_c^2], fp32 `[Hkv, D]`."""
    last = element.grid.queries - 1
    some = element.query[:, last % QUERY_STEP :: QUERY_STEP].float()
    return rearrange(some, "(h g) m d -> h (g m) d", g=element.groups).square().mean(1)


def _clusters(keys: Tensor, real: Tensor, count: int) -> Tensor:
    """Which keys belong to which of R clusters, fp32 0 or 1 `[Hkv, nk, R, B]`.

    Seeds: the key farthest from the mean, then each time the key farthest from the mean and all seeds. A seed at
    distance 0 stands for nothing, so equal keys make one cluster. Among equals the lower position, or cluster, is
    taken.
    """
    centres, used = [], []
    nearest = _distance(keys, _mean(keys, real.float()))
    for seed in range(count):
        far = nearest.masked_fill(~real, -1.0)
        place = _first(far == far.amax(-1, keepdim=True))
        used.append(torch.ones_like(place, dtype=torch.bool) if seed == 0 else far.amax(-1) > 0)
        centres.append(keys.gather(2, place[..., None, None].expand(*place.shape, 1, keys.shape[-1]))[:, :, 0])
        nearest = torch.minimum(nearest, _distance(keys, centres[-1]))
    for _ in range(CLUSTER_STEPS):
        member = _nearest(keys, real, centres, used)
        centres = [
            torch.where(m.sum(-1, keepdim=True) > 0, _mean(keys, m), centre)
            for m, centre in zip(member.unbind(2), centres, strict=True)
        ]
    return _nearest(keys, real, centres, used)


def _outliers(keys: Tensor, real: Tensor, count: int) -> Tensor:
    """The same for all keys but R - 1, and for those R - 1 that are farthest from the mean, lower positions first."""
    distance = _distance(keys, _mean(keys, real.float())).masked_fill(~real, -1.0)
    order = distance.sort(dim=-1, descending=True, stable=True).indices[..., : count - 1]
    alone = torch.zeros(*keys.shape[:2], count - 1, keys.shape[2], device=keys.device)
    alone = alone.scatter(-1, order[..., None], 1.0) * real[:, :, None]
    return torch.cat((real[:, :, None] * (1 - alone.sum(2, keepdim=True)), alone), 2)


def _mean(keys: Tensor, weight: Tensor) -> Tensor:
    """`[Hkv, nk, D]`: the mean of keys with a weight of 1, of `[Hkv, nk, B]`."""
    return (weight[:, :, None] @ keys)[:, :, 0] / weight.sum(-1, keepdim=True).clamp(min=1)


def _distance(keys: Tensor, centre: Tensor) -> Tensor:
    """Squared, `[Hkv, nk, B]`."""
    return (keys - centre[:, :, None]).square().sum(-1)


def _nearest(keys: Tensor, real: Tensor, centres: list[Tensor], used: list[Tensor]) -> Tensor:
    distances = torch.stack([_distance(keys, centre) for centre in centres], 2)  # [Hkv, nk, R, B]
    distances = distances.masked_fill(~torch.stack(used, 2)[..., None], torch.inf)
    cluster = _first((distances == distances.amin(2, keepdim=True)).transpose(2, 3))
    return (cluster[:, :, None] == torch.arange(len(centres), device=keys.device)[:, None]) * real[:, :, None].float()


def _first(true: Tensor) -> Tensor:
    """Index of the first true item of the last dimension."""
    place = torch.arange(true.shape[-1], device=true.device)
    return torch.where(true, place, true.shape[-1] - 1).amin(-1)
