"""Launches of Triton kernels: an earlier one's kernel is taken where nothing that it was compiled for differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
launch = pytest.importorskip("flexprefill_fa.kernels.launch")


def add(x, y, count, scale, BLOCK, ALL):
    """A kernel's signature; it is not compiled here."""


class Compiled:
    """Stands for what Triton compiled; says what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments: self.launches.append((grid, arguments))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What Triton's own launches returned."""
    made: list[Compiled] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        made.append(Compiled())
        return made[-1]

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return made


def test_an_earlier_launch_is_taken(compiled: list[Compiled]) -> None:
    kernel = launch.Kernel(add)
    first, second = (torch.zeros(8), torch.zeros(8)), (torch.ones(8), torch.ones(8))
    kernel[(3,)](*first, 8, 0.5, ALL=True, BLOCK=16, num_warps=4)
    kernel[(5, 2)](*second, 8, 0.5, ALL=True, BLOCK=16, num_warps=4)
    assert len(compiled) == 1
    (grid, arguments), *rest = compiled[0].launches
    assert grid == (5, 2, 1) and not rest, "the first one was Triton's own"
    assert arguments[0] is second[0] and arguments[1] is second[1]
    assert arguments[2:] == (8, 0.5, 16, True), "in the signature's order, without the options"


def test_what_makes_another_kernel(compiled: list[Compiled]) -> None:
    kernel = launch.Kernel(add)
    x, y, wide = torch.zeros(8), torch.zeros(8), torch.zeros(9)
    constants: dict[str, Any] = {"BLOCK": 16, "ALL": True, "num_warps": 4}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, y, 8, 0.5), constants),
        ((x.half(), y, 8, 0.5), constants),
        ((x, wide[1:], 8, 0.5), constants),
        ((x, None, 8, 0.5), constants),
        ((x, y, 1, 0.5), constants),
        ((x, y, 9, 0.5), constants),
        ((x, y, 2**33, 0.5), constants),
        ((x, y, 8, 1), constants),
        ((x, y, 8, 1.0), constants),
        ((x, y, 8, True), constants),
        ((x, y, 8, 0.5), {**constants, "BLOCK": 32}),
        ((x, y, 8, 0.5), {**constants, "ALL": False}),
        ((x, y, 8, 0.5), {**constants, "num_warps": 8}),
        ((x.to("meta"), y, 8, 0.5), constants),
    ]
    for number, (arguments, named) in enumerate(calls, 1):
        for _ in range(2):
            kernel[(1,)](*arguments, **named)
        assert len(compiled) == number
    assert all(len(one.launches) == 1 for one in compiled)


def test_what_is_left_to_triton(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8)
    kernel = launch.Kernel(add)
    for _ in range(2):
        kernel.run(x, x, 8, 0.5, BLOCK=16, ALL=True, grid=(1,), warmup=True)
    kernel.add_pre_run_hook(lambda *arguments, **named: None)
    for _ in range(2):
        kernel[(1,)](x, x, 8, 0.5, BLOCK=16, ALL=True)
    assert len(compiled) == 4


def test_it_is_bounded(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST", 4)
    kernel, x = launch.Kernel(add), torch.zeros(8)
    for count in range(20):
        kernel[(1,)](x, x, count, 0.5, BLOCK=16, ALL=True)
        assert len(kernel._launches) <= 4
    kernel[(1,)](x, x, 19, 0.5, BLOCK=16, ALL=True)
    assert len(compiled) == 20 and len(compiled[-1].launches) == 1
