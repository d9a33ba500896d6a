"""How a call is timed on a GPU that no CUDA graph can hold: over a stand-in for the GPU's queue, and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import Stopwatch

LAUNCH_MS = 0.005


class Gpu:
    """Milliseconds at which the CPU is and the GPU's queue ends; events on the GPU's clock."""

    def __init__(self) -> None:
        self.host = self.end = 0.0

    def launch(self, milliseconds: float) -> None:
        self.host += LAUNCH_MS
        self.end = max(self.host, self.end) + milliseconds

    def wait(self, *_: Any) -> None:
        self.host = max(self.host, self.end)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        made = SimpleNamespace(at=0.0)
        made.record = lambda: setattr(made, "at", max(self.host, self.end))
        made.query = lambda: made.at <= self.host
        made.elapsed_time = lambda other: other.at - made.at
        return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: made.host / 1e3)
    return made


def watch(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, repeats: int = 12) -> Stopwatch:
    """As on a GPU, where calls are not to be captured."""

    def capture(call: Any) -> None:
        raise AssertionError("it captured")

    made = Stopwatch(torch.device("cpu"), repeats, 60.0)
    made._flush = SimpleNamespace(zero_=lambda: gpu.launch(0.1))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(made, "_capture", capture)
    made.captures = False
    return made


def kernels(gpu: Gpu, count: int, gpu_ms: float, host_ms: float) -> Callable[[], None]:
    """A call of several kernels, with work of the CPU before each."""

    def call() -> None:
        for _ in range(count):
            gpu.host += host_ms
            gpu.launch(gpu_ms)

    return call


def test_what_the_cpu_takes_is_hidden_behind_other_work(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    call = kernels(gpu, 10, gpu_ms=0.02, host_ms=0.3)
    times = watch(gpu, monkeypatch).graph(call)
    assert (times.timed_by, times.repeats) == ("CUDA events, queued", 12)
    assert times.median == pytest.approx(0.2) and times.p80 == pytest.approx(0.2)
    plain, ahead = watch(gpu, monkeypatch)._events(call, 3)
    assert not ahead and min(plain) > 2, "without other work before it the gaps are in the time"


def test_a_call_that_waits_for_the_gpu_has_its_gaps_and_says_so(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        kernels(gpu, 2, gpu_ms=0.02, host_ms=0.3)()
        gpu.wait()
        kernels(gpu, 1, gpu_ms=0.02, host_ms=0.3)()

    times = watch(gpu, monkeypatch).graph(call)
    assert times.timed_by == "CUDA events" and times.median > 0.3


def test_a_cpu_that_is_too_slow_for_the_queue(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing._MOST_FLUSHES", 3)
    times = watch(gpu, monkeypatch, 7).graph(kernels(gpu, 10, gpu_ms=0.02, host_ms=0.3))
    assert (times.timed_by, times.repeats) == ("CUDA events", 7)


def test_what_cannot_be_captured_is_queued_too(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = watch(gpu, monkeypatch), []
    made.captures = True
    monkeypatch.setattr(made, "_capture", tried.append)  # None: it is in no graph
    call = kernels(gpu, 10, gpu_ms=0.02, host_ms=0.3)
    assert made.graph(call).timed_by == "CUDA events, queued" and tried == [call]


@pytest.mark.gpu
def test_a_kernel_on_the_default_stream_is_in_no_graph() -> None:
    x = torch.randn(4096, 4096, device="cuda")

    def call(default: bool = True) -> Tensor:
        """Its product by the default stream, whichever is current, with CPU time beside it."""
        time.sleep(1e-3)
        out = torch.empty_like(x)
        with torch.cuda.stream(torch.cuda.default_stream() if default else torch.cuda.current_stream()):
            return torch.mm(x, x, out=out)

    made, current = Stopwatch(x.device, 12, 10.0), torch.cuda.current_stream()
    captured = made.graph(lambda: call(False))
    for captures in (True, False):
        made.captures = captures
        times = made.graph(call)
        print({"events_ms": times.median, "graph_ms": captured.median})
        assert (times.timed_by, captured.timed_by) == ("CUDA events, queued", "CUDA graph")
        assert times.median == pytest.approx(captured.median, rel=0.25)
    assert torch.cuda.current_stream() == current
