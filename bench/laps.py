"""Times of parts of a run, taken without waiting for the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Laps:
    """The time that a part of a run takes, by CUDA events on a GPU and by the wall clock on a CPU.

    Args:
        device: on which the part runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Time the body once more. On a GPU it is the time between the work around it, gaps included."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def forget(self) -> None:
        """Start anew."""
        self._events, self._seconds = [], []

    def total_ms(self) -> float:
        """Of all laps; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in self._events) + 1e3 * sum(self._seconds)

    def __len__(self) -> int:
        return len(self._events) + len(self._seconds)
