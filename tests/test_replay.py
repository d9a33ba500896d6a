"""Calls of a kind that was served before skip torch.compile's guards: with the same results, where they may."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from every_selector import example
from surroundings import CONFIG, check_call, check_output
from threads import together
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import random_qk, structured_qk

from flexprefill_fa import FlexPrefillConfig, Selector, selector_names, sparse_prefill_attention
from flexprefill_fa.masks import selector as selector_module
from flexprefill_fa.masks.element import Element
from flexprefill_fa.replay import Replayed, _Recording, inductor


@dataclass(frozen=True)
class Extra:
    factor: float
    bias: Tensor | None = None


def region(x: Tensor, pair: tuple[Tensor | None, Tensor], extra: Extra, shift: int = 0) -> tuple[Tensor, tuple]:
    first = x if pair[0] is None else x + pair[0]
    out = first * extra.factor + shift + x.shape[0]
    return (out if extra.bias is None else out + extra.bias), (pair[1].sin(), pair[1] * 2)


class Counted(Replayed):
    """Counts the calls that go through torch.compile."""

    def __init__(self, function: Callable[..., Any]) -> None:
        graph = torch.compile(function, backend=inductor, fullgraph=True, dynamic=True)
        self.compiled = 0

        def through(*arguments: Any, **named: Any) -> Any:
            self.compiled += 1
            return graph(*arguments, **named)

        super().__init__(through, contextlib.nullcontext)


@pytest.fixture
def counted() -> Counted:
    torch._dynamo.reset()
    return Counted(region)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one for each call that is replayed."""
    calls: list[None] = []
    again = _Recording.again

    def count(self: _Recording, *arguments: Any) -> Any:
        calls.append(None)
        return again(self, *arguments)

    monkeypatch.setattr(_Recording, "again", count)
    return calls


def check(counted: Counted, compiled: int, *arguments: Any, **named: Any) -> None:
    """The region's results, after that many calls through torch.compile."""
    torch.testing.assert_close(counted(*arguments, **named), region(*arguments, **named))
    assert counted.compiled == compiled


def tensors(rows: int = 5, columns: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, columns), torch.randn(rows, columns)


def test_other_values_are_replayed(counted: Counted) -> None:
    for _ in range(4):
        x, y = tensors()
        check(counted, 1, x, (y, torch.randn(3)), Extra(2.0), shift=1)


def test_what_is_another_kind(counted: Counted) -> None:
    (x, y), z = tensors(), torch.randn(3)
    with torch.no_grad():
        check(counted, 1, x, (y, z), Extra(2.0))
        others: list[tuple[Any, ...]] = [
            (x[:3], (y[:3], z), Extra(2.0)),
            (torch.randn(7, 5).T, (y, z), Extra(2.0)),
            (x.double(), (y, z), Extra(2.0)),
            (x, (None, z), Extra(2.0)),
            (x, (y, torch.randn(4)), Extra(2.0)),
            (x, (y, z), Extra(3.0)),
            (x, (y, z), Extra(2.0, torch.randn(7))),
            (x, (y, z), Extra(2.0), 4),
            (x.clone().requires_grad_(), (y, z), Extra(2.0)),
        ]
        for number, other in enumerate(others, 2):
            check(counted, number, *other)
        for other in [(x, (y, z), Extra(2.0)), *others]:
            check(counted, len(others) + 1, *other)


def test_true_is_not_one(counted: Counted) -> None:
    (x, y), z = tensors(), torch.randn(3)
    for compiled, shift in enumerate((1, True, 1.0), 1):
        check(counted, compiled, x, (y, z), Extra(2.0), shift)


@contextlib.contextmanager
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "place",
    [torch.inference_mode, torch.enable_grad, precision, deterministic, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference_mode", "grad", "precision", "deterministic", "autocast"],
)
def test_the_state_of_the_process(counted: Counted, place: Callable[[], AbstractContextManager]) -> None:
    (x, y), z = tensors(), torch.randn(3)
    with torch.no_grad():
        check(counted, 1, x, (y, z), Extra(2.0))
        with place():
            check(counted, 2, x, (y, z), Extra(2.0))
            check(counted, 2, x, (y, z), Extra(2.0))


@pytest.mark.parametrize(
    "place",
    [Passing, lambda: torch.device("cpu"), lambda: torch.compiler.set_stance("eager_on_recompile")],
    ids=["function_mode", "default_device", "stance"],
)
def test_what_watches_is_asked_each_time(counted: Counted, place: Callable[[], AbstractContextManager]) -> None:
    (x, y), z = tensors(), torch.randn(3)
    with place():
        check(counted, 1, x, (y, z), Extra(2.0))
        check(counted, 2, x, (y, z), Extra(2.0))


def test_a_tensor_given_twice(counted: Counted) -> None:
    x, z = torch.randn(5, 7), torch.randn(3)
    for compiled in (1, 2):
        check(counted, compiled, x, (x, z), Extra(2.0))
    check(counted, 3, x, (torch.randn(5, 7), z), Extra(2.0))


def test_a_callers_function_may_change() -> None:
    values = torch.tensor([1.0])

    def function(x: Tensor) -> Tensor:
        return x * values

    counted = Counted(lambda x, function: function(x))
    for compiled in (1, 2):
        values += 1
        assert torch.equal(counted(torch.ones(3), function), torch.full((3,), 1.0 + compiled))
        assert counted.compiled == compiled


def test_a_callers_object_may_change() -> None:
    @dataclass(frozen=True)
    class Times:
        def __call__(self, x: Tensor) -> Tensor:
            return x * values

    values, counted = torch.tensor([1.0]), Counted(lambda x, function: function(x))
    for compiled in (1, 2):
        values += 1
        assert torch.equal(counted(torch.ones(3), Times()), torch.full((3,), 1.0 + compiled))
        assert counted.compiled == compiled


def test_a_result_that_is_an_argument() -> None:
    counted = Counted(lambda x: (x, x + 1))
    for compiled in (1, 2):
        x = torch.randn(4)
        assert counted(x)[0] is x and counted.compiled == compiled


def test_tensors_that_start_elsewhere(counted: Counted) -> None:
    flat, z = torch.randn(40), torch.randn(3)
    for first in (0, 1, 3, 4):
        x = flat[first : first + 35].view(5, 7)
        check(counted, 1, x, (torch.randn(5, 7), z), Extra(2.0))


def test_a_reset_forgets(counted: Counted) -> None:
    (x, y), z = tensors(), torch.randn(3)
    check(counted, 1, x, (y, z), Extra(2.0))
    torch._dynamo.reset()
    check(counted, 2, x, (y, z), Extra(2.0))


def test_an_error_within_a_call_is_not_the_next_ones() -> None:
    fails = [False]

    @torch.library.custom_op("flexprefill_fa_tests::may_fail", mutates_args=())
    def may_fail(x: Tensor) -> Tensor:
        if fails[0]:
            raise torch.OutOfMemoryError("no room")
        return x * 2

    may_fail.register_fake(lambda x: torch.empty_like(x))
    counted = Counted(lambda x: may_fail(x) + 1)
    for turn in range(6):
        fails[0] = turn in (0, 3)
        x = torch.randn(4)
        if fails[0]:
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                counted(x)
        else:
            assert torch.equal(counted(x), x * 2 + 1)
    assert counted.compiled == 2


def test_it_is_bounded(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexprefill_fa.replay._MOST", 3)
    z = torch.randn(3)
    calls = [(x, (y, z), Extra(2.0)) for x, y in (tensors(rows) for rows in range(2, 8))]
    for compiled, call in enumerate(calls, 1):
        check(counted, compiled, *call)
        assert len(counted._recordings) <= 3
    check(counted, len(calls), *calls[-1])
    check(counted, len(calls) + 1, *calls[0])


def test_threads(counted: Counted) -> None:
    failures = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(200):
            rows = 2 + (seed + turn) % 3
            x, y = (torch.randn(rows, 7, generator=generator) for _ in range(2))
            arguments = x, (y, y[0]), Extra(2.0)
            with torch.no_grad():
                found = counted(*arguments)
            if not torch.allclose(found[0], region(*arguments)[0]):
                failures.append(seed)

    together([partial(run, seed) for seed in range(4)])
    assert not failures and counted.compiled < 50


def test_a_sparse_call(replays: list[None]) -> None:
    kinds: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"starts": [0, 130], "lengths": [900, 700]}]
    for arguments in kinds:
        query, key = structured_qk(2, 4, 2, 900, 900, 32)
        before = len(replays)
        for seed in range(3):
            value = torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                found = sparse_prefill_attention(query, key, value, CONFIG, return_selection=True, **arguments)
                with Watching():  # uncompiled, over the same blocks
                    plain = sparse_prefill_attention(query, key, value, CONFIG, **arguments)
            assert found[1].density().mean() < 0.8
            torch.testing.assert_close(found[0], plain, atol=1e-4, rtol=1e-4)
        assert len(replays) - before >= 2, arguments
    check_call(starts=[1, 0], lengths=[800, 850])
    check_call(seed=1, starts=[0, 130], lengths=[900, 700])
    assert len(replays) >= 8


def test_other_settings_select_other_blocks(replays: list[None]) -> None:
    query, key = structured_qk(1, 4, 2, 900, 900, 32)
    value = torch.randn(key.shape)
    densities = []
    for gamma in (0.3, 0.8):
        config = FlexPrefillConfig(gamma=gamma, tau=0.0, min_budget=1)
        with torch.no_grad():
            out, selection = sparse_prefill_attention(query, key, value, config, return_selection=True)
        check_output(out, selection, query, key, value)
        densities.append(selection.density().mean().item())
    assert densities[0] < densities[1] - 0.05 and len(replays) >= 1


@pytest.mark.parametrize("name", selector_names())
def test_every_selector(name: str, replays: list[None]) -> None:
    config = example(name)
    for seed in range(3):
        query, key = random_qk(1, 4, 2, 700, 700, 32, seed=seed)
        value = torch.randn(key.shape)
        with torch.no_grad():
            found = sparse_prefill_attention(query, key, value, config, dense="never", return_selection=True)
            with Watching():  # uncompiled, over the same blocks
                plain = sparse_prefill_attention(query, key, value, config, dense="never")
        torch.testing.assert_close(found[0], plain, atol=1e-4, rtol=1e-4)
    assert len(replays) >= 2


def test_errors_are_those_of_a_first_call(replays: list[None]) -> None:
    query, key = structured_qk(1, 4, 2, 900, 900, 32)
    value = torch.randn(key.shape)
    with torch.no_grad():
        out = sparse_prefill_attention(query, key, value, CONFIG)
    replays.clear()
    needs = query.clone().requires_grad_()
    with pytest.raises(ValueError, match="query requires grad"):
        sparse_prefill_attention(needs, key, value, CONFIG)
    with torch.no_grad():
        wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"scale": float("nan")}, ValueError, "scale must be"),
            ({"backend": "TRITON"}, ValueError, "backend='TRITON' cannot run"),
            ({"dense": "maybe"}, ValueError, "dense must be one of"),
            ({"lengths": [0]}, ValueError, "lengths must be at least 1"),
        ]
        for arguments, kind, message in wrong:
            with pytest.raises(kind, match=message):
                sparse_prefill_attention(query, key, value, CONFIG, **arguments)
        with pytest.raises(TypeError, match="key and value must have one dtype"):
            sparse_prefill_attention(query, key, value.half(), CONFIG)
        assert not replays
        assert torch.equal(sparse_prefill_attention(query, key, value, CONFIG), out) and len(replays) == 1


def test_a_selector_that_is_defined_again(monkeypatch: pytest.MonkeyPatch, replays: list[None]) -> None:
    for name in ("_OPERATORS", "_REGISTRY"):
        monkeypatch.setattr(selector_module, name, dict(getattr(selector_module, name)))

    def define(kept: int) -> Any:
        @dataclass(frozen=True)
        class Nearest(Selector, name="nearest_again"):
            def keep(self, element: Element) -> Tensor:
                first, _ = element.diagonal()
                block = torch.arange(element.grid.kv_blocks, device=element.device)
                return (first[:, None] - block < kept).expand(element.heads, -1, -1)

        return Nearest()

    query, key = random_qk(1, 4, 2, 900, 900, 32)
    value, configs = torch.randn(key.shape), []
    for kept in (1, 3):
        configs.append(define(kept))
        for _ in range(2):
            with torch.no_grad():
                out, selection = sparse_prefill_attention(query, key, value, configs[-1], return_selection=True)
            check_output(out, selection, query, key, value)
            assert selection.kept_blocks()[0, 0] == (8 + 7 if kept == 1 else 8 + 7 + 6 + 5)
    with pytest.raises(ValueError, match="was defined again"), torch.no_grad():
        sparse_prefill_attention(query, key, value, configs[0])
