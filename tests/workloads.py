"""Queries and keys for the tests: random ones, and ones whose heads have the patterns that selectors look for."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def random_qk(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, *, seed: int = 0, sharpness: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gaussian query [B, Hq, Lq, D] and key [B, Hkv, Lkv, D]; sharpness scales the scores."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, q_len, dim, generator=generator) * sharpness
    return query, torch.randn(batch, kv_heads, kv_len, dim, generator=generator)


def structured_qk(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Heads with a sink, heavy key tokens, a local slope and topic blocks, in shares that differ from head to head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key = draw(batch, heads, q_len, dim) * 0.5, draw(batch, kv_heads, kv_len, dim) * 0.5
    position = torch.arange(kv_len)
    angle = position[:, None] * torch.logspace(0, -3, dim // 4)  # rotary-like local structure
    wave = torch.cat((angle.cos(), angle.sin()), -1)  # [Lkv, D/2]
    topic = torch.nn.functional.one_hot((position // 200) % 5, 5).float() @ draw(5, dim)
    key[..., : wave.shape[-1]] += 1.5 * wave
    key += topic
    key[:, :, 0] += 2.0
    key[:, :, torch.randperm(kv_len, generator=generator)[: max(1, kv_len // 300)]] += draw(1, 1, 1, dim)
    share = torch.linspace(0.0, 1.5, heads)[None, :, None, None]
    query[..., : wave.shape[-1]] += 1.5 * (1.5 - share) * wave[kv_len - q_len :]
    query += share * topic[kv_len - q_len :] + 0.3 * share
    return query, key


def blocky_qk(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gaussian queries and keys, with a direction for each run of 50 of either: block scores that differ."""
    query, key = random_qk(batch, heads, kv_heads, q_len, kv_len, dim, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def runs(tensor: Tensor) -> Tensor:
        shape = (*tensor.shape[:2], -(-tensor.shape[2] // 50), dim)
        return torch.randn(shape, generator=generator).repeat_interleave(50, 2)[:, :, : tensor.shape[2]]

    return query + 1.5 * runs(query), key + 0.7 * runs(key)


def needle_pairs(q_len: int, kv_len: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """(query index, position of the key that it looks for) of 1 in 200 queries or fewer; no two share a key."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[int, int] = {}
    for index in torch.randperm(q_len, generator=generator)[: max(1, q_len // 200)].tolist():
        visible = kv_len - q_len + index + 1
        pairs.setdefault(int(torch.randint(visible, (), generator=generator)), index)
    return [(index, position) for position, index in pairs.items()]


def needle_qk(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    dim: int,
    *,
    seed: int = 0,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Structured heads in which some queries attend to one key alone, at the default scale.

    pairs: as `needle_pairs` gives them, which draws them by default; the same in all heads, all keys different.
    """
    query, key = structured_qk(batch, heads, kv_heads, q_len, kv_len, dim, seed=seed)
    pairs = needle_pairs(q_len, kv_len, seed=seed) if pairs is None else pairs
    generator = torch.Generator().manual_seed(seed + 2)
    strength = ((math.log(kv_len) + 10) * math.sqrt(dim)) ** 0.5  # e^10 times the weight of all others
    for index, position in pairs:
        direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
        query[:, :, index] = key[:, :, position] = strength * direction
    return query, key
