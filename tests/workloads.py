"""Queries and keys for the tests: random ones, and ones whose heads have the patterns that selectors look for."""

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
