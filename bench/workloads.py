"""Seeded queries, keys and values whose heads attend as those of language models do.

Each key carries five features in subspaces of their own: its position as rotary-like waves, the topic of its segment,
whether it is one of a few heavy tokens, whether it is the first token (the sink), and noise. A query head looks for a
mixture of them; the head's archetype says which (`ARCHETYPES`). All heads of a kv group read the same keys.

Everything is drawn on the CPU, a kv group at a time, and rounded to the wanted dtype before it is moved: the numbers
do not depend on the device.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

SEGMENT = 256
"""Tokens of one topic: two blocks, so that block means see topics whole."""
_TOPICS = 48
_HEAVY_TOKENS = 12
_FEATURE_NORM = 8.0  # of each feature in a key
_KEY_NOISE, _QUERY_NOISE = 0.5, 1.0
_THREADS = min(4, os.cpu_count() or 1)  # a group takes 1 GB at 256K tokens
_SLOWEST_WAVE, _FASTEST_WAVE = 1 / 1024, 2.5  # radians per token


class Archetype(NamedTuple):
    """What a query head looks for: scores in nats at sharpness 1, before noise.

    `local` is that of the query's own position, and falls off like a power of the distance; `sink` of the first token;
    `heavy` of the strongest heavy token; `slash` of each key at one of `offsets` tokens before the query; `topic` of
    keys in segments of the topic that the query's own topic points to.
    """

    local: float = 0.0
    sink: float = 0.0
    heavy: float = 0.0
    slash: float = 0.0
    offsets: tuple[int, ...] = ()
    topic: float = 0.0


ARCHETYPES = {
    "local": Archetype(local=12.5, sink=11.5),
    "vertical": Archetype(local=9.0, sink=12.0, heavy=14.0),
    "slash": Archetype(sink=11.0, slash=12.0, offsets=(0, 171, 1023)),
    "mixed": Archetype(local=11.5, sink=12.0, heavy=12.5),
    "topic": Archetype(topic=11.0),
}
"""The vertical-slash kinds of head (the first four) and the one that FlexPrefill finds query-aware."""

_CYCLE = ("local", "vertical", "slash", "mixed", "local", "vertical", "slash", "topic")


def archetype_of(head: int) -> str:
    """Name of the archetype of a query head."""
    return _CYCLE[head % len(_CYCLE)]


class Inputs(NamedTuple):
    """query `[B, Hq, n, D]`, key and value `[B, Hkv, n, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor


class Group:
    """One kv head `[n, D]` with the query heads that read it, all from one seed; fp32 on the CPU.

    `query` draws from the group's generator: call it for the heads of the group in order.
    """

    def __init__(self, n: int, dim: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        waves = dim * 3 // 8  # frequencies; a cosine and a sine each
        topics = dim * 3 // 16
        self._wave_slice = slice(0, 2 * waves)
        self._topic_slice = slice(2 * waves, 2 * waves + topics)
        self._sink_dim, self._heavy_dim = dim - 1, dim - 2
        frequency = torch.logspace(math.log10(_FASTEST_WAVE), math.log10(_SLOWEST_WAVE), waves, dtype=torch.float64)
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency % (2 * math.pi)  # [n, W]
        self._cos, self._sin = angle.float().cos(), angle.float().sin()
        self._frequency = frequency
        vectors = torch.randn(_TOPICS, topics, generator=self._generator)
        chosen = torch.randint(_TOPICS, (-(-n // SEGMENT),), generator=self._generator)
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        self._topic, self._wanted_topic = (
            vectors[index % _TOPICS].repeat_interleave(SEGMENT, 0)[:n] for index in (chosen, chosen + 1)
        )
        heavy = (torch.rand(_HEAVY_TOKENS, generator=self._generator) * n).long()
        weight = torch.linspace(1.0, 0.6, _HEAVY_TOKENS)

        self.key = torch.randn(n, dim, generator=self._generator) * _KEY_NOISE
        self.key[:, self._wave_slice] += self._waves(torch.ones(waves, dtype=torch.complex128)) * _FEATURE_NORM
        self.key[:, self._topic_slice] += self._topic * _FEATURE_NORM
        self.key[heavy, self._heavy_dim] += weight * _FEATURE_NORM
        self.key[0, self._sink_dim] += _FEATURE_NORM
        self.value = torch.randn(n, dim, generator=self._generator)

    def query(self, archetype: Archetype, strength: float = 1.0) -> Tensor:
        """Queries `[n, D]` of the group's next head, at sharpness 1."""
        nats = math.sqrt(self.key.shape[1]) / _FEATURE_NORM * strength  # query amplitude that scores 1
        query = torch.randn(*self.key.shape, generator=self._generator) * _QUERY_NOISE
        # A sum of waves shifted by the offsets is one wave with other coefficients.
        shift = torch.full_like(self._frequency, archetype.local * nats, dtype=torch.complex128)
        for offset in archetype.offsets:
            shift += archetype.slash * nats * torch.exp(-1j * self._frequency * offset)
        if shift.any():
            query[:, self._wave_slice] += self._waves(shift)
        query[:, self._topic_slice] += self._wanted_topic * (archetype.topic * nats)
        query[:, self._heavy_dim] += archetype.heavy * nats
        query[:, self._sink_dim] += archetype.sink * nats
        return query

    def _waves(self, coefficients: Tensor) -> Tensor:
        """Position waves `[n, 2 W]` times complex coefficients `[W]`; of norm 1 where those are 1."""
        scaled = coefficients / math.sqrt(len(coefficients))
        real, imaginary = scaled.real.float(), scaled.imag.float()
        return torch.cat((self._cos * real - self._sin * imaginary, self._cos * imaginary + self._sin * real), -1)


SHARPNESS = {
    4096: 0.585,  # mean density 0.754
    8192: 0.75,  # 0.541
    16384: 0.913,  # 0.338
    32768: 1.05,  # 0.192
    65536: 1.208,  # 0.0902
    131072: 1.44,  # 0.0453
    262144: 1.5,  # 0.0252
}
"""Factor on the queries of the "sharpened" series by length, and the mean density that the plain FlexPrefill with its
defaults then has (32 query heads, 8 kv heads, D 128, bf16, seed 0): what FlashPrefill's second version reports for real
models up to 128K tokens, 0.76, 0.54, 0.34, 0.19, 0.09 and 0.046, and one step more."""

FIXED_SHARPNESS = SHARPNESS[16384]
"""The same factor at every length: the "fixed" series."""


def sharpness_of(workload: str, length: int) -> float:
    """Factor on the queries of a structured workload; between the lengths of the table, linear in log(length)."""
    if workload == "fixed":
        return FIXED_SHARPNESS
    lengths = sorted(SHARPNESS)
    known = [SHARPNESS[known] for known in lengths]
    return float(numpy.interp(math.log(length), [math.log(known) for known in lengths], known))


def structured_inputs(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    sharpness: float,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Inputs of the archetypes, head h of kind `archetype_of(h)`, as many queries as keys.

    `heads` are a multiple of `kv_heads`, `head_dim` of 16; `sharpness` is the factor on the queries. The numbers are
    the same on every device.
    """
    query = torch.empty(1, heads, length, head_dim, dtype=dtype, device=device)
    key, value = (torch.empty(1, kv_heads, length, head_dim, dtype=dtype, device=device) for _ in range(2))
    per_group = heads // kv_heads

    def fill(kv_head: int) -> None:
        group = Group(length, head_dim, seed * 4096**2 + kv_head)
        key[0, kv_head] = group.key.to(dtype)
        value[0, kv_head] = group.value.to(dtype)
        for head in range(kv_head * per_group, (kv_head + 1) * per_group):
            strength = 0.9 + 0.2 * (head * 0.6180339887 % 1.0)  # spread evenly, so that no two heads are alike
            drawn = group.query(ARCHETYPES[archetype_of(head)], strength)
            query[0, head] = (drawn * sharpness).to(dtype)

    # Drawing normal numbers uses one core; a group has a generator of its own.
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fill, range(kv_heads)))
    return Inputs(query, key, value)
