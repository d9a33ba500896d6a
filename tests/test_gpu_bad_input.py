"""On a CUDA GPU: calls that fail by name, after which the next one works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, cuda_graphs, sparse_prefill_attention
from flexprefill_fa.cuda_graphs import PrefillGraph

pytestmark = pytest.mark.gpu

CONFIG = FlexPrefillConfig(min_budget=256, gamma=0.8)
HOW: Any = {"dense": "never", "backend": "TRITON"}


def inputs(seed: int, length: int = 1500) -> tuple[Tensor, Tensor, Tensor]:
    query, key = (x.to("cuda", torch.bfloat16) for x in structured_qk(1, 4, 2, length, length, 64, seed=seed))
    return query, key, torch.randn_like(key)


def check(graph: PrefillGraph, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """A replay equals the eager call, which drops blocks."""
    expected, selection = sparse_prefill_attention(*given, CONFIG, return_selection=True, **HOW)
    assert selection.density().mean() < 0.95
    assert torch.equal(graph(*given), expected)


def test_a_graph_replayed_on_something_else_says_so_and_goes_on() -> None:
    first, second, other = inputs(1), inputs(2), inputs(3, 1400)
    graph = PrefillGraph(*first, CONFIG, **HOW)
    halves = tuple(x.half() for x in second)
    for wrong in (other, halves):
        with pytest.raises(ValueError, match=r"the graph was captured for a query of .*got"):
            graph(*wrong)
        check(graph, second)
    with pytest.raises(ValueError, match=r"the graph was captured for a query of .*got .*device\(type='cpu'\)"):
        graph(*(x.cpu() for x in second))
    with pytest.raises(ValueError, match="query and key must be on one device"):
        graph(second[0], second[1].cpu(), second[2])
    check(graph, first)


def test_a_graph_follows_inputs_of_any_strides() -> None:
    graph = PrefillGraph(*inputs(1), CONFIG, **HOW)
    second = inputs(2)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in second)
    assert not strided[0].is_contiguous()
    expected = sparse_prefill_attention(*second, CONFIG, **HOW)
    assert torch.equal(graph(*strided), expected)


@pytest.mark.parametrize("turn", [1, 3])
def test_too_little_memory_in_the_middle_of_a_capture(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a warm-up, and in the captured call itself."""
    given, turns = inputs(1), []
    whole = cuda_graphs.sparse_prefill_attention

    def greedy(query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        turns.append(torch.cuda.is_current_stream_capturing())
        out = whole(query, *arguments, **named)
        if len(turns) == turn:
            torch.empty(2**46, dtype=torch.uint8, device=query.device)
        return out

    monkeypatch.setattr(cuda_graphs, "sparse_prefill_attention", greedy)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        PrefillGraph(*given, CONFIG, **HOW)
    assert turns == [False, False, True][:turn]
    monkeypatch.undo()
    assert not torch.cuda.is_current_stream_capturing()
    check(PrefillGraph(*given, CONFIG, **HOW), inputs(2))


def test_too_little_memory_in_an_eager_call() -> None:
    """Nothing of the failed call is replayed in the next."""
    given = inputs(1)
    expected = sparse_prefill_attention(*given, CONFIG, **HOW)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    fillers: list[Tensor] = []
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            while True:  # what is free within the reserved memory
                fillers.append(torch.empty(2**16, dtype=torch.uint8, device="cuda"))
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            sparse_prefill_attention(*given, CONFIG, **HOW)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    fillers.clear()
    assert torch.equal(sparse_prefill_attention(*given, CONFIG, **HOW), expected)
