"""Sparse attention of a prefill chunk over a paged KV cache, and what it counts. Imports no vLLM.

The keys and values that a chunk sees are gathered once per layer, in the order of their positions, because a selector
reads all keys anyway and FlexAttention's fastest kernel takes no block table. What the gather costs is in the rows of
`python -m bench vllm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.attention import sparse_prefill_attention
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.grid import cdiv
from flexprefill_fa.selection import BlockSelection

from .vllm_config import Settings

AttendChunk = Callable[[Tensor, Tensor, Tensor, Settings, float], tuple[Tensor, BlockSelection]]


def key_value_dim(get_kv_cache_shape: Callable[..., tuple[int, ...]]) -> int | None:
    """The dimension of a KV cache that tells keys from values, None for a layout that this module does not read.

    Args:
        get_kv_cache_shape: `(blocks, block_size, kv_heads, head_dim)` -> shape. Read are
            `[2, blocks, block_size, kv_heads, head_dim]` and `[blocks, 2, block_size, kv_heads, head_dim]`.
    """
    blocks, block_size, heads, head_dim = 1009, 64, 5, 128
    try:
        shape = list(get_kv_cache_shape(blocks, block_size, heads, head_dim))
    except (NotImplementedError, ValueError):
        return None
    page = [block_size, heads, head_dim]
    layouts = ([2, blocks, *page], [blocks, 2, *page])
    return layouts.index(shape) if shape in layouts else None


def gather(cache: Tensor, blocks: Tensor, kv_len: int) -> Tensor:
    """Keys or values of one request in the order of their positions.

    Args:
        cache: `[blocks, block_size, Hkv, D]`, any strides.
        blocks: which of them the request has, in order, int `[n]`; n x block_size >= kv_len.
        kv_len: tokens.

    Returns:
        `[1, Hkv, kv_len, D]`, a view of a new `[n x block_size, Hkv, D]`.
    """
    tokens = cache.index_select(0, blocks).flatten(0, 1)  # [n * block_size, Hkv, D]
    return tokens[:kv_len].transpose(0, 1)[None]


def attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, settings: Settings, scale: float
) -> tuple[Tensor, BlockSelection]:
    """Select and attend, for one chunk.

    Args:
        query: `[1, Hq, q_len, D]`, the last of the keys.
        key, value: `[1, Hkv, kv_len, D]`.
        settings: selector and kernel.
        scale: of the scores.

    Returns:
        `[1, Hq, q_len, D]` and what was kept.
    """
    # Named, for "auto" may run dense, and dense attention is the parent's business.
    backend = resolve_backend(settings.backend, query, settings.selector.block_size)
    return sparse_prefill_attention(
        query, key, value, settings.selector, scale=scale, backend=backend, return_selection=True
    )


def attend_paged(
    query: Tensor,
    cache: Tensor,
    dim: int,
    blocks: Tensor,
    kv_len: int,
    settings: Settings,
    scale: float,
    attend: AttendChunk = attend_chunk,
) -> tuple[Tensor, BlockSelection]:
    """One chunk over a paged cache.

    Args:
        query: `[q_len, Hq, D]`, the last of the keys.
        cache: keys and values, apart along `dim`, see `key_value_dim`. The chunk's own are in it already.
        blocks: of the request, int `[n]`.
        kv_len: keys that the chunk's last query sees.
        settings, scale: as for `attend_chunk`.
        attend: what runs; another one only to measure.

    Returns:
        `[q_len, Hq, D]` and what was kept.
    """
    keys, values = cache.unbind(dim)
    out, selection = attend(
        query.transpose(0, 1)[None], gather(keys, blocks, kv_len), gather(values, blocks, kv_len), settings, scale
    )
    return out[0].transpose(0, 1), selection


@functools.lru_cache(maxsize=4096)
def causal_blocks(q_len: int, kv_len: int, block_size: int) -> int:
    """Blocks that dense causal attention of a chunk computes, in one head."""
    offset = kv_len - q_len
    return sum(cdiv(min(offset + first + block_size, kv_len), block_size) for first in range(0, q_len, block_size))


class DensityCounter:
    """What the sparse chunks of one layer kept, added up on their device; reading it waits, adding does not.

    Attributes:
        chunks: that ran sparse; queries: in them.
        failures: chunks for which sparse attention failed, so that the parent served their step.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from nothing."""
        self.chunks = self.queries = self.failures = 0
        self.causal = 0
        self.kept: Tensor | None = None  # int64 []

    def add(self, selection: BlockSelection) -> None:
        """Count one chunk."""
        kept = selection.kept_blocks()  # [1, Hq]
        total = kept.sum()
        self.kept = total if self.kept is None else self.kept + total
        self.causal += causal_blocks(selection.q_len, selection.kv_len, selection.block_size) * kept.shape[1]
        self.chunks += 1
        self.queries += selection.q_len

    def read(self) -> dict[str, Any]:
        """Counts, and `density` = kept blocks / causal blocks over all chunks and heads (None before the first)."""
        density = None if self.kept is None else int(self.kept) / self.causal
        return {"chunks": self.chunks, "queries": self.queries, "density": density, "failures": self.failures}


class DensityLog:
    """A line with the mean density of several layers, not more often than every `seconds`; never waits for the GPU."""

    def __init__(self, counters: Sequence[DensityCounter], seconds: float) -> None:
        self._counters = counters
        self._seconds = seconds
        self._last = -float("inf")
        self._pending: tuple[Tensor, torch.cuda.Event | None, str] | None = None

    def poll(self, now: float) -> str | None:
        """A line that is due, or None; `now` in seconds. The numbers were copied from the GPU since an earlier call."""
        line = None
        if self._pending is not None and (self._pending[1] is None or self._pending[1].query()):
            kept, _, text = self._pending
            line, self._pending = text.format(density=float(kept)), None
        ran = [counter for counter in self._counters if counter.kept is not None]
        if self._pending is None and self._seconds and ran and now - self._last >= self._seconds:
            self._last = now
            self._pending = self._copy(ran)
        return line

    def _copy(self, ran: list[DensityCounter]) -> tuple[Tensor, torch.cuda.Event | None, str]:
        kept = [counter.kept for counter in ran if counter.kept is not None]
        density = torch.stack(kept).sum() / sum(counter.causal for counter in ran)
        chunks = max(counter.chunks for counter in ran)
        queries = max(counter.queries for counter in ran)
        failures = sum(counter.failures for counter in self._counters)
        text = f"sparse prefill so far: {chunks} chunks of {queries} tokens, density {{density:.3f}}, {failures} failed"
        if density.device.type != "cuda":
            return density, None, text
        event = torch.cuda.Event()
        copied = torch.empty((), dtype=density.dtype, pin_memory=True).copy_(density, non_blocking=True)
        event.record()
        return copied, event, text


def warm_up_lengths(rows: int, max_keys: int, settings: Settings) -> list[tuple[int, int]]:
    """(queries, keys) of the chunks to run before the first request: one for each form that compiles on its own.

    A whole prompt has a simpler mask than a chunk behind a cached prefix, and lengths that 128 divides need no bounds
    checks. The largest are among them: what they allocate is the peak.

    Args:
        rows: the most queries of a step.
        max_keys: the most keys of a request.
    """
    keys = max_keys // 128 * 128
    queries = min(rows // 128 * 128, keys)
    behind = min(queries, keys - 128)  # a cached prefix of a block at least
    lengths = [(queries - cut, queries - cut) for cut in (1, 0)] + [(behind - cut, keys) for cut in (1, 0)]
    least = settings.min_prefill_tokens, settings.min_prompt_tokens
    return [(q_len, kv_len) for q_len, kv_len in lengths if q_len >= least[0] and kv_len >= least[1]]


def warm_up(
    query: Tensor, kv_heads: int, max_keys: int, settings: Settings, scale: float, attend: AttendChunk = attend_chunk
) -> int:
    """Compile and run chunks of every form on zeros, of this query's memory layout; how many.

    Args:
        query: `[rows, Hq, D]` of the longest step; its values do not count.
        kv_heads: Hkv.
        max_keys: the most keys of a request.
        settings, scale, attend: as for `attend_paged`.
    """
    lengths = warm_up_lengths(query.shape[0], max_keys, settings)
    if not lengths:
        return 0
    zeros = torch.empty_strided(query.shape, query.stride(), dtype=query.dtype, device=query.device).zero_()
    keys = query.new_zeros(2, max(kv_len for _, kv_len in lengths), kv_heads, query.shape[-1])
    for q_len, kv_len in lengths:
        attend(
            zeros[:q_len].transpose(0, 1)[None],
            keys[0, :kv_len].transpose(0, 1)[None],
            keys[1, :kv_len].transpose(0, 1)[None],
            settings,
            scale,
        )
    return len(lengths)
