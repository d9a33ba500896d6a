"""Sparse attention of a prefill chunk over a paged KV cache, and what it counts. Imports no vLLM.

The keys and values that a chunk sees are gathered once per layer, in the order of their positions: a selector reads all
keys anyway, and it and FlexAttention's kernels take keys in order, without a block table. `python -m bench vllm --only
gather` measures what that costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexprefill_fa.attention import sparse_prefill_attention
from flexprefill_fa.grid import cdiv
from flexprefill_fa.selection import BlockSelection

from .vllm_config import Settings
from .vllm_version import CacheLayout

_ROWS = 128  # a buffer has a multiple of these

AttendChunk = Callable[[Tensor, Tensor, Tensor, Settings, float], tuple[Tensor, BlockSelection]]


class GatherBuffer:
    """Room for the gathered keys and values of one chunk: all layers of one shape use it in turn, on one stream.

    Taken once, in vLLM's profiling run, so that vLLM counts it: a new tensor for every chunk, each longer than the
    last, would leave behind freed memory that no later chunk fits into. Keys and values are two tensors, each at the
    start of its memory, which is what compiled kernels are told of alignment.
    """

    def __init__(self) -> None:
        self._room: tuple[Tensor, Tensor] | None = None

    def room(self, rows: int, kv_heads: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two contiguous `[at least rows, kv_heads, D]`, of the dtype, device and last dimension of `like`."""
        if self._room is None or self._room[0].shape[0] < rows:
            self._room = None  # freed before the larger one is taken
            shape = (cdiv(rows, _ROWS) * _ROWS, kv_heads, like.shape[-1])
            self._room = like.new_empty(shape), like.new_empty(shape)
        return self._room


def gather(cache: Tensor, blocks: Tensor, kv_len: int, out: Tensor) -> Tensor:
    """Keys or values of one request in the order of their positions.

    Args:
        cache: `[blocks, block_size, Hkv, D]`, any strides.
        blocks: which of them the request has, in order, int `[n]`; n x block_size >= kv_len.
        kv_len: tokens.
        out: contiguous `[at least n x block_size, Hkv, D]`, overwritten.

    Returns:
        `[1, Hkv, kv_len, D]`, a view of `out`.
    """
    pages, size = len(blocks), cache.shape[1]
    torch.index_select(cache, 0, blocks, out=out[: pages * size].unflatten(0, (pages, size)))
    return out[:kv_len].transpose(0, 1)[None]


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
    return sparse_prefill_attention(
        query,
        key,
        value,
        settings.selector,
        scale=scale,
        dense="never",  # dense attention is the parent's business
        backend=settings.backend,
        return_selection=True,
    )


def attend_paged(
    query: Tensor,
    cache: Tensor,
    layout: CacheLayout,
    blocks: Tensor,
    kv_len: int,
    settings: Settings,
    scale: float,
    buffer: GatherBuffer,
    attend: AttendChunk = attend_chunk,
) -> tuple[Tensor, BlockSelection]:
    """One chunk over a paged cache.

    Args:
        query: `[q_len, Hq, D]`, the last of the keys.
        cache: keys and values of one layer. The chunk's own are in it already.
        layout: where it has them.
        blocks: of the request, int `[n]`.
        kv_len: keys that the chunk's last query sees.
        settings, scale: as for `attend_chunk`.
        buffer: for the keys and values in order.
        attend: what runs; another one only to measure.

    Returns:
        `[q_len, Hq, D]` and what was kept.
    """
    halves = layout.split(cache)
    room = buffer.room(len(blocks) * halves[0].shape[1], halves[0].shape[2], query)
    key, value = (gather(half, blocks, kv_len, out) for half, out in zip(halves, room, strict=True))
    out, selection = attend(query.transpose(0, 1)[None], key, value, settings, scale)
    return out[0].transpose(0, 1), selection


@functools.lru_cache(maxsize=4096)
def causal_blocks(q_len: int, kv_len: int, block_size: int) -> int:
    """Blocks that dense causal attention of a chunk computes, in one head."""
    offset = kv_len - q_len
    return sum(cdiv(min(offset + first + block_size, kv_len), block_size) for first in range(0, q_len, block_size))


class Tally(NamedTuple):
    """What one chunk kept: blocks kept (int64 `[]`, on its device) and causal blocks, of all heads; its queries."""

    kept: Tensor
    causal: int
    queries: int


def tally(selection: BlockSelection) -> Tally:
    """Of one chunk, without waiting for its device."""
    kept = selection.kept_blocks()  # [1, Hq]
    causal = causal_blocks(selection.q_len, selection.kv_len, selection.block_size) * kept.shape[1]
    return Tally(kept.sum(), causal, selection.q_len)


class DensityCounter:
    """What the sparse chunks of one layer kept, added up on their device; reading it waits, adding does not.

    Attributes:
        chunks: that ran sparse; queries: in them.
        failures: chunks for which sparse attention failed, so that the parent served their step.
        declined: chunks of long prompts that the parent served because they, or their step, could not run sparse.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from nothing."""
        self.chunks = self.queries = self.failures = self.declined = 0
        self.causal = 0
        self.kept: Tensor | None = None  # int64 []

    def add(self, chunk: Tally) -> None:
        """Count one chunk."""
        self.kept = chunk.kept if self.kept is None else self.kept + chunk.kept
        self.causal += chunk.causal
        self.chunks += 1
        self.queries += chunk.queries

    def read(self) -> dict[str, Any]:
        """Counts, and `density` = kept blocks / causal blocks over all chunks and heads (None before the first)."""
        density = None if self.kept is None else int(self.kept) / self.causal
        counts = {"failures": self.failures, "declined": self.declined}
        return {"chunks": self.chunks, "queries": self.queries, "density": density, **counts}


class DensityLog:
    """A line with the mean density of several layers, not more often than every `seconds`; never waits for the GPU."""

    def __init__(self, counters: Sequence[DensityCounter], seconds: float) -> None:
        self._counters = counters
        self._seconds = seconds
        self._last = -float("inf")
        self._seen = 0  # chunks, at the latest look
        self._pending: tuple[Tensor, torch.cuda.Event | None, str] | None = None

    def poll(self, now: float) -> str | None:
        """A line that is due, or None; `now` in seconds. The numbers were copied from the GPU since an earlier call."""
        line = None
        if self._pending is not None and (self._pending[1] is None or self._pending[1].query()):
            kept, _, text = self._pending
            line, self._pending = text.format(density=float(kept)), None
        if self._pending is None and self._seconds and now - self._last >= self._seconds:
            ran = [counter for counter in self._counters if counter.kept is not None]
            seen = sum(counter.chunks for counter in ran)
            if seen != self._seen and ran:  # nothing new is no line
                self._last = now
                self._pending = self._copy(ran)
            self._seen = seen
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
        copied = torch.empty((), dtype=density.dtype, device="cpu", pin_memory=True).copy_(density, non_blocking=True)
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
    query: Tensor,
    kv_heads: int,
    max_keys: int,
    room: int,
    settings: Settings,
    scale: float,
    buffer: GatherBuffer,
    attend: AttendChunk = attend_chunk,
) -> int:
    """Compile and run chunks of every form on zeros, of this query's memory layout; how many.

    The buffer gets its memory here and keeps it.

    Args:
        query: `[rows, Hq, D]` of the longest step; its values do not count.
        kv_heads: Hkv.
        max_keys: the most keys of a request.
        room: the same in whole blocks of the KV cache.
        settings, scale, buffer, attend: as for `attend_paged`.
    """
    lengths = warm_up_lengths(query.shape[0], max_keys, settings)
    if not lengths:
        return 0
    zeros = torch.empty_strided(query.shape, query.stride(), dtype=query.dtype, device=query.device).zero_()
    key, value = (tensor.zero_() for tensor in buffer.room(room, kv_heads, query))
    for q_len, kv_len in lengths:
        attend(
            zeros[:q_len].transpose(0, 1)[None],
            key[:kv_len].transpose(0, 1)[None],
            value[:kv_len].transpose(0, 1)[None],
            settings,
            scale,
        )
    return len(lengths)
