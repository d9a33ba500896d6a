"""Sparse attention of a prefill chunk over an engine's paged KV cache. Imports no engine.

The keys and values that a chunk sees are gathered once per layer, in the order of their positions: a selector reads all
keys anyway, and it and FlexAttention's kernels take keys in order, without a block table. `python -m bench serve`
measures what that costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexprefill_fa.attention import sparse_prefill_attention
from flexprefill_fa.grid import cdiv
from flexprefill_fa.selection import BlockSelection

from .engine_settings import Settings

_ROWS = 128  # a buffer has a multiple of these

AttendChunk = Callable[[Tensor, Tensor, Tensor, Settings, float], tuple[Tensor, BlockSelection]]


class GatherBuffer:
    """Room for the gathered keys and values of one chunk: all layers of one shape use it in turn, on one stream.

    Taken once, when the engine starts: a new tensor for every chunk, each longer than the last, would leave behind
    freed memory that no later chunk fits into. Keys and values are two tensors, each at the
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
    keys: Tensor,
    values: Tensor,
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
        keys, values: of one layer's cache, `[blocks, block_size, Hkv, D]`. The chunk's own are in it already.
        blocks: of the request, int `[n]`.
        kv_len: keys that the chunk's last query sees.
        settings, scale: as for `attend_chunk`.
        buffer: for the keys and values in order.
        attend: what runs; another one only to measure.

    Returns:
        `[q_len, Hq, D]` and what was kept.
    """
    room = buffer.room(len(blocks) * keys.shape[1], keys.shape[2], query)
    key, value = (gather(half, blocks, kv_len, out) for half, out in zip((keys, values), room, strict=True))
    out, selection = attend(query.transpose(0, 1)[None], key, value, settings, scale)
    return out[0].transpose(0, 1), selection


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
