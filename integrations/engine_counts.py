"""What sparse prefill chunks kept: counted on their device, read without making anybody wait. Imports no engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.selection import BlockSelection


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
        """Counts, blocks of all heads, and `density` = kept blocks / causal blocks (None before the first chunk)."""
        kept = 0 if self.kept is None else int(self.kept)
        return {
            "chunks": self.chunks,
            "queries": self.queries,
            "density": kept / self.causal if self.causal else None,
            "kept_blocks": kept,
            "causal_blocks": self.causal,
            "failures": self.failures,
            "declined": self.declined,
        }


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
