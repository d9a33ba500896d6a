"""Times of GPU work by CUDA graph replay with a cold cache, and of whole calls by the wall clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from flexprefill_fa.tools.rows import Row, environment

WARM_UPS = 2
LEAST_REPEATS = 3
_LEAST_FLUSH_BYTES = 256 * 2**20  # long enough to hide the launches that are queued behind it
_QUEUED = 5  # eager calls that are queued together
_MOST_FLUSHES = 500  # before them: a GPU's queue holds some thousand launches


def described(kind: str, device: torch.device, dtype: torch.dtype, **fields: Any) -> Row:
    """What a row says before it is measured: its kind, where it is measured, and other fields."""
    name = str(dtype).removeprefix("torch.")
    return {"kind": kind, "device": device.type, **environment(device), "dtype": name, **fields}


def significant(value: float) -> float:
    """Four digits that count: what a busy CPU does rounds to no hundredth."""
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: median, 20th and 80th percentile of `repeats`, and how they were taken."""

    median: float
    p20: float
    p80: float
    repeats: int
    timed_by: str

    def fields(self, name: str) -> dict[str, Any]:
        """The row's fields `name`, `name_p20`, `name_p80`; name ends in the unit."""
        return {name: round(self.median, 5), f"{name}_p20": round(self.p20, 5), f"{name}_p80": round(self.p80, 5)}


def summarise(milliseconds: list[float], timed_by: str) -> Times:
    """Median and percentiles, between the nearest two measurements."""
    low, middle, high = numpy.quantile(milliseconds, (0.2, 0.5, 0.8)).tolist()
    return Times(middle, low, high, len(milliseconds), timed_by)


class Stopwatch:
    """Times calls on one device: `repeats` measurements of each, or fewer where they would take longer than `seconds`,
    but at least `LEAST_REPEATS`; `captures` says whether `graph` may try to capture a call.
    """

    def __init__(self, device: torch.device, repeats: int, seconds: float) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds
        self.captures = True
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, _LEAST_FLUSH_BYTES)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def eager(self, call: Callable[[], object]) -> Times:
        """Wall time from before the call to the end of its GPU work; on a GPU with a cold L2 cache."""
        count = self._warm_up(call)
        return summarise([self._wall(call) for _ in range(count)], "wall clock")

    def graph(self, call: Callable[[], object]) -> Times:
        """GPU time of the call alone with a cold L2 cache, by replay of a CUDA graph; wall time on a CPU.

        A call that cannot be captured, or whose kernels are in no graph, is timed by events around eager calls, which
        are queued behind other work for as long as the CPU takes for them. `timed_by` says whether it was ahead of the
        GPU throughout; else gaps between a call's kernels are in its time.
        """
        if self._flush is None:
            return self.eager(call)
        count = self._warm_up(call)
        captured = self._capture(call) if self.captures else None
        if captured is None:
            return self._queued(call, count)
        times = summarise(self._events(captured.replay, count)[0], "CUDA graph")
        captured.reset()
        return times

    def _warm_up(self, call: Callable[[], object]) -> int:
        """Run the call until it is warm; how many measurements the allowed time holds."""
        for _ in range(WARM_UPS - 1):
            self._wall(call)
        affordable = int(self.seconds * 1e3 / max(self._wall(call), 1e-3))
        return min(self.repeats, max(affordable, LEAST_REPEATS))

    def _wall(self, call: Callable[[], object]) -> float:
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        if self._flush is not None:
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) * 1e3

    def _capture(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        stream = torch.cuda.Stream(self.device)  # not the default one for captures: that belongs to one device
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=stream):
                result = call()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # each kernel library has its own way of refusing a capture
            torch.cuda.synchronize(self.device)
            return None
        finally:
            torch.cuda.set_stream(before)  # a capture that cannot be ended leaves its own, which events would be on
        return graph if _holds(graph, result) else None

    def _events(self, call: Callable[[], object], count: int, flushes: int = 0) -> tuple[list[float], bool]:
        """Milliseconds of calls behind that many flushes, and whether all was queued before the first had begun."""
        assert self._flush is not None
        call()
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for _ in range(flushes):
            self._flush.zero_()
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        ahead = not pairs[0][0].query()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs], ahead

    def _queued(self, call: Callable[[], object], count: int) -> Times:
        """Times of eager calls, a few at a time behind enough flushes to hide what the CPU takes to launch them."""
        assert self._flush is not None
        flush_ms = statistics.median(self._events(self._flush.zero_, LEAST_REPEATS)[0])
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - start) * 1e3
        flushes = min(math.ceil(2 * _QUEUED * host_ms / flush_ms), _MOST_FLUSHES)  # twice: the CPU's times vary
        parts = [self._events(call, min(_QUEUED, count - first), flushes) for first in range(0, count, _QUEUED)]
        ahead = all(part[1] for part in parts)
        taken = [milliseconds for part in parts for milliseconds in part[0]]
        return summarise(taken, "CUDA events, queued" if ahead else "CUDA events")


def _holds(graph: torch.cuda.CUDAGraph, result: object) -> bool:
    """Whether a replay computes the result anew: a kernel on another stream than the captured one is in no graph."""
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return True
    result.fill_(torch.nan)
    graph.replay()
    return not bool(result.isnan().any())


class Timer:
    """The time that a part of a run takes, without waiting: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[Callable[[], float]] = []

    @contextmanager
    def once(self) -> Iterator[None]:
        """Time the body once more. On a GPU it is the time between the work around it, gaps included."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            taken = 1e3 * (time.perf_counter() - start)
            self._times.append(lambda: taken)
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._times.append(lambda: begin.elapsed_time(end))

    def take_ms(self) -> float:
        """Milliseconds of all bodies since the last call; waits for the GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        times, self._times = self._times, []
        return sum(taken() for taken in times)
