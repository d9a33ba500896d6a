"""The reference selector against the brute-force oracle, block for block, over the whole range of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparison import compare_with_oracle
from torch import Tensor
from workloads import random_qk, structured_qk

from flexprefill_fa import FlexPrefillConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_NEAR_TIES = 0.05  # share of heads


@dataclass(frozen=True)
class Shape:
    """What the queries and keys look like: lengths in tokens, (first real key, real keys) of each batch element."""

    q_len: int
    kv_len: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    padding: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32


SHAPES = {
    "short": Shape(257, 257),
    "whole blocks": Shape(1024, 1024),
    "odd": Shape(1001, 1001),
    "one past a block": Shape(1153, 1153, heads=3, kv_heads=1, dim=80),
    "one before a block": Shape(895, 895, heads=2, kv_heads=2, dim=16),
    "2048": Shape(2048, 2048, heads=8, kv_heads=2),
    "chunk, aligned": Shape(512, 1280),
    "chunk, odd offset": Shape(700, 1333),
    "chunk of 127": Shape(127, 1100),
    "chunk of 128": Shape(128, 1100),
    "chunk of 129": Shape(129, 1100),
    "chunk of 2": Shape(2, 900),
    "one query": Shape(1, 900),
    "left padding": Shape(900, 900, heads=2, kv_heads=1, padding=((0, 900), (131, 769), (128, 772), (640, 260))),
    "right padding": Shape(900, 900, heads=2, kv_heads=1, padding=((0, 900), (0, 769), (0, 640), (0, 300))),
    "both paddings": Shape(1100, 1100, heads=2, kv_heads=1, padding=((3, 1000), (200, 700), (64, 1036), (900, 100))),
    "padded chunk": Shape(500, 1100, heads=2, kv_heads=1, padding=((0, 1100), (77, 1023), (650, 450), (10, 890))),
    "queries all padded": Shape(200, 1100, heads=2, kv_heads=1, padding=((0, 880), (0, 900), (0, 901), (899, 2))),
    "small scale": Shape(1000, 1000, scale=0.02),
    "large scale": Shape(1000, 1000, scale=0.9),
    "bf16": Shape(1000, 1000, heads=6, kv_heads=3, dtype=torch.bfloat16),
    "fp16 left padding": Shape(
        1000, 1000, heads=2, kv_heads=1, dim=112, padding=((0, 1000), (300, 700)), dtype=torch.float16
    ),
}
# (gamma, tau, min_budget, max_budget)
NUMBERS = [
    (0.5, 0.1, 1, None),
    (0.9, 0.5, 1, None),
    (0.95, 0.0, 256, None),
    (0.95, 0.1, 200, 512),
    (0.999, 0.5, 129, 640),
    (1.0, 0.1, 1, None),
]
KINDS = list(itertools.product(("published", "paper"), (64, 128)))


def settings(first: int, each: int, *, nudge: float = 0.0) -> list[FlexPrefillConfig]:
    """`each` configs per variant and block size, going round the list of numbers from `first` on.

    nudge lowers gamma: rows of nearly uniform attention sum up one after the other to whole numbers, so there must be
    no whole gamma x nq among them.
    """
    configs = []
    for index, (variant, block_size) in enumerate(KINDS):
        for step in range(each):
            gamma, tau, least, most = NUMBERS[(first + index + step) % len(NUMBERS)]
            gamma = gamma if gamma == 1 else gamma - nudge
            configs.append(FlexPrefillConfig(gamma, tau, least, most, block_size, variant))
    return configs


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("make", [random_qk, structured_qk])
def test_equals_oracle(name: str, make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    shape = SHAPES[name]
    batch = len(shape.padding) if shape.padding else 1
    starts, lengths = zip(*shape.padding, strict=True) if shape.padding else (None, None)
    heads = near = 0
    first = list(SHAPES).index(name) + (make is random_qk)
    for seed, config in enumerate(settings(first, 1, nudge=0.0137 if make is random_qk else 0.0)):
        query, key = make(batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.dim, seed=seed)
        count, ties, _ = compare_with_oracle(
            query.to(shape.dtype), key.to(shape.dtype), config, starts, lengths, shape.scale
        )
        heads, near = heads + count, near + ties
    assert near <= max(1, MAX_NEAR_TIES * heads), (
        f"{near} of {heads} heads hang on a near-tie: the comparison says too little"
    )


@pytest.mark.parametrize("variant", ["published", "paper"])
def test_inputs_reach_both_patterns_and_real_sparsity(variant: Any) -> None:
    """The inputs above mean something: many heads of either pattern, densities from low to full."""
    aware, density = [], []
    for seed in range(4):
        query, key = structured_qk(1, 8, 4, 3000, 3000, 32, seed=seed)
        config = FlexPrefillConfig(0.9, 0.25, 1, None, 128, variant)
        _, _, selection = compare_with_oracle(query, key, config)
        aware.append(selection.js_distance < config.tau)
        density.append(selection.density())
    share = torch.cat(aware).float().mean()
    assert 0.1 < share < 0.9
    assert torch.cat(density).min() < 0.65 and torch.cat(density).max() > 0.75


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 20.0])
def test_flat_and_peaked_attention(sharpness: float) -> None:
    """Nearly uniform attention, and attention so peaked that probabilities underflow in fp32."""
    for seed, config in enumerate(settings(0, 3, nudge=0.0137)):
        query, key = random_qk(2, 2, 1, 900, 900, 32, seed=seed, sharpness=sharpness)
        compare_with_oracle(query, key, config)


def test_published_underflow_is_nan_and_vertical_slash() -> None:
    """A probability of exactly zero makes the released code's distance NaN, which is below no threshold."""
    query, key = random_qk(1, 2, 1, 600, 600, 32)
    key[:, :, 128:256] = -1e4 * query[:, :1, -128:].mean(2, keepdim=True)  # block 1 gets no attention at all
    published = FlexPrefillConfig(0.9, 1.0, 1, variant="published")
    _, _, selection = compare_with_oracle(query, key, published)
    assert selection.js_distance[0, 0].isnan()
    _, _, selection = compare_with_oracle(query, key, FlexPrefillConfig(0.9, 1.0, 1, variant="paper"))
    assert selection.js_distance.isfinite().all()
    assert (selection.js_distance <= 0.8326).all()
