"""How sharp the heads of the "sharpened" series must be at each length to reach the published densities.

The table `bench.workloads.SHARPNESS` came from `python -m bench calibrate`: the plain reference of FlexPrefill on the
CPU, a head at a time, on the queries and keys that the benchmark makes (32 query heads, 8 kv heads, D 128, bf16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bench.workloads import ARCHETYPES, Group, archetype_of, group_seed, strength_of
from flexprefill_fa import FlexPrefillConfig, select_blocks

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128

TARGET_DENSITY = {
    4096: 0.76,
    8192: 0.54,
    16384: 0.34,
    32768: 0.19,
    65536: 0.09,
    131072: 0.046,
    262144: 0.025,
}
"""Mean density by length: what FlashPrefill's second version reports for real models up to 128K, and one step more."""


def head_densities(
    length: int, sharpness: Sequence[float], seed: int = 0, on_head: Callable[[], object] | None = None
) -> Tensor:
    """Density of every head at every sharpness, float64 `[HEADS, len(sharpness)]`, with FlexPrefill's defaults.

    Args:
        length: tokens.
        sharpness: factors on the queries.
        seed: of the workload.
        on_head: called after each head.
    """
    config = FlexPrefillConfig()
    densities = torch.zeros(HEADS, len(sharpness), dtype=torch.float64)
    per_group = HEADS // KV_HEADS
    for kv_head in range(KV_HEADS):
        group = Group(length, HEAD_DIM, group_seed(seed, 0, kv_head))
        key = group.key.bfloat16()[None, None]
        for head in range(kv_head * per_group, (kv_head + 1) * per_group):
            query = group.query(ARCHETYPES[archetype_of(head)], strength_of(head))
            for column, factor in enumerate(sharpness):
                selection = select_blocks((query * factor).bfloat16()[None, None], key, config)
                densities[head, column] = selection.density().item()
            if on_head is not None:
                on_head()
    return densities


def interpolate(sharpness: Sequence[float], density: Sequence[float], target: float) -> float:
    """The sharpness at which the log of the density, linear between the measured points, is that of the target.

    Raises:
        ValueError: if the target lies outside the measured densities.
    """
    points = sorted(zip(sharpness, density, strict=True))
    for (low, above), (high, below) in pairwise(points):
        if below <= target <= above:
            share = math.log(above / target) / math.log(above / below) if above > below else 0.0
            return low + share * (high - low)
    measured = ", ".join(f"{d:.3f} at {s:g}" for s, d in points)
    raise ValueError(f"density {target:g} is outside what was measured ({measured}): give other values of sharpness")
