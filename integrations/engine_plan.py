"""Which requests of an engine's step run sparse, and where the others' rows are. Imports no engine.

Everything here is decided from numbers on the host; nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine_settings import LEAST_PREFILL_TOKENS, Settings


@dataclass(frozen=True)
class Chunk:
    """One prefill chunk: rows `start` to `end` of the step's queries, the last of the `kv_len` keys of a request."""

    request: int
    start: int
    end: int
    kv_len: int

    @property
    def q_len(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class StepSplit:
    """`chunks` run sparse; `rest` are the other requests with queries, by index, for the parent."""

    chunks: tuple[Chunk, ...]
    rest: tuple[int, ...]


def split_requests(query_start_loc: Sequence[int], kv_lens: Sequence[int], settings: Settings) -> StepSplit:
    """Which requests of a step run sparse.

    Args:
        query_start_loc: first query row of each request and, last, the number of rows, `[requests + 1]`.
        kv_lens: keys that each request's last query sees, cached ones included, `[requests]`.
        settings: the thresholds.
    """
    chunks, rest = [], []
    for request, kv_len in enumerate(kv_lens):
        chunk = Chunk(request, query_start_loc[request], query_start_loc[request + 1], kv_len)
        if chunk.q_len >= settings.min_prefill_tokens and kv_len >= max(settings.min_prompt_tokens, chunk.q_len):
            chunks.append(chunk)
        elif chunk.q_len:
            rest.append(request)
    return StepSplit(tuple(chunks), tuple(rest))


def count_declined(
    query_start_loc: Sequence[int], kv_lens: Sequence[int], split: StepSplit | None, settings: Settings
) -> int:
    """Chunks of prompts long enough for sparse attention that the parent serves: too few queries, or no split.

    Args:
        query_start_loc, kv_lens: as for `split_requests`.
        split: of the step, None where no request runs sparse.
        settings: the thresholds. Fewer than 128 queries are no chunk but decoding, drafts or a question.
    """
    long = sum(
        end - start >= LEAST_PREFILL_TOKENS and kv_len >= settings.min_prompt_tokens
        for start, end, kv_len in zip(query_start_loc[:-1], query_start_loc[1:], kv_lens, strict=True)
    )
    return max(0, long - (len(split.chunks) if split else 0))


Rows = slice | Tensor
"""Rows of a step's queries: a slice where they stand together, else their indices, int64 on the queries' device."""


def take(tensor: Any, rows: Rows) -> Any:
    """`tensor[rows]` along the first dimension, without a copy where the rows stand together.

    Lists and arrays too, whose rows are on the host, and None.
    """
    if tensor is None:
        return None
    if isinstance(tensor, Tensor):
        return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
    if isinstance(rows, slice):
        return tensor[rows]
    return [tensor[row] for row in rows.tolist()] if isinstance(tensor, list) else tensor[rows.numpy()]


@dataclass(frozen=True)
class Part:
    """Some requests of a step: their query rows and their indices, on the device and on the host.

    Attributes:
        rows: of their queries.
        requests, on_host: which they are, for `take` of what is on the device and on the host.
        lengths: queries of each.
    """

    rows: Rows
    requests: Rows
    on_host: Rows
    lengths: list[int]


def part_of_step(query_start_loc: Sequence[int], requests: Sequence[int], device: torch.device) -> Part:
    """Where some requests of a step are.

    Args:
        query_start_loc: as for `split_requests`.
        requests: indices, ascending, at least one.
        device: of the queries.
    """
    spans = [(query_start_loc[request], query_start_loc[request + 1]) for request in requests]
    lengths = [end - start for start, end in spans]
    first, last = requests[0], requests[-1]
    if spans[-1][1] - spans[0][0] == sum(lengths) and last - first + 1 == len(requests):
        which = slice(first, last + 1)
        return Part(slice(spans[0][0], spans[-1][1]), which, which, lengths)
    rows = to_device(torch.cat([torch.arange(start, end, device="cpu") for start, end in spans]), device)
    on_host = torch.tensor(requests, device="cpu")
    return Part(rows, to_device(on_host, device), on_host, lengths)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host, without waiting for what the GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
