"""`graph="auto"`: which calls are captured, replayed and dropped, with a stand-in for the graph that runs the call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from graph_stand_in import Graph, stand_in
from threads import together
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, PeakPrefillConfig, dispatch, graph_cache, release_graphs
from flexprefill_fa import sparse_prefill_attention as attend

CONFIG = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
Three = tuple[Tensor, Tensor, Tensor]


def inputs(seed: int = 0, tokens: int = 700, batch: int = 1) -> Three:
    query, key = structured_qk(batch, 4, 2, tokens, tokens, 32, seed=seed)
    return query, key, torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The graphs that were made, in order."""
    with torch.no_grad():
        yield stand_in(monkeypatch)


def check(seed: int = 0, tokens: int = 700, config: Any = CONFIG, **arguments: Any) -> Tensor:
    """One call equals the one without a graph."""
    given = inputs(seed, tokens)
    out = attend(*given, config, graph="auto", **arguments)
    assert torch.equal(out, attend(*given, config, **arguments))
    return out


def test_the_first_call_is_eager_the_second_captures_and_the_rest_replays(made: list[Graph]) -> None:
    outs = []
    for seed in range(5):
        outs.append(check(seed))
        assert len(made) == (seed > 0)
    assert made[0].replays == 4
    for seed, out in enumerate(outs):
        assert torch.equal(out, attend(*inputs(seed), CONFIG)), "a later call wrote over it"


def test_off_by_default_and_by_name(made: list[Graph]) -> None:
    for _ in range(3):
        attend(*inputs(), CONFIG)
        attend(*inputs(), CONFIG, graph="never")
    assert not made
    for wrong in ("always", True, None, ["auto"]):
        with pytest.raises(ValueError, match=r"graph must be one of \('never', 'auto'\), got"):
            attend(*inputs(), CONFIG, graph=wrong)  # pyright: ignore[reportArgumentType]


def test_each_kind_has_its_own_graph(made: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "MOST_GRAPHS", 100)
    changed = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
    cases: list[tuple[Callable[[], AbstractContextManager[Any]], int, dict[str, Any]]] = [
        (contextlib.nullcontext, 700, {}),
        (contextlib.nullcontext, 600, {}),
        (contextlib.nullcontext, 700, {"config": FlexPrefillConfig(gamma=0.8, tau=0.0, min_budget=1)}),
        (contextlib.nullcontext, 700, {"config": PeakPrefillConfig()}),
        (contextlib.nullcontext, 700, {"scale": 0.3}),
        (contextlib.nullcontext, 700, {"dense": "never"}),
        (contextlib.nullcontext, 700, {"starts": [0]}),
        (torch.inference_mode, 700, {}),
    ]
    for _ in range(3):
        for place, tokens, arguments in cases:
            with place():
                check(tokens=tokens, **arguments)
    assert [graph.replays for graph in made] == [2] * len(cases)
    object.__setattr__(changed, "gamma", 0.7)
    for _ in range(2):
        check(config=changed)
    assert len(made) == len(cases) + 1
    monkeypatch.setattr(graph_cache, "stream_for_graphs", lambda query, key: 1)
    for _ in range(3):
        check()
    assert len(made) == len(cases) + 2 and made[-1].replays == 2


def test_padding_travels_to_each_replay(made: list[Graph]) -> None:
    given = inputs(batch=2)
    for turn, lengths in enumerate(([700, 300], [300, 700], [1, 699], [650, 650])):
        place: dict[str, Any] = {"lengths": lengths, "starts": [0, 700 - lengths[1]]}
        out = attend(*given, CONFIG, graph="auto", **place)
        expected = attend(*given, CONFIG, **place)
        assert torch.equal(out[0, :, : lengths[0]], expected[0, :, : lengths[0]])
        assert torch.equal(out[1, :, 700 - lengths[1] :], expected[1, :, 700 - lengths[1] :])
        assert len(made) == (turn > 0)
    with pytest.raises(ValueError, match="lengths must be at least 1"):
        attend(*given, CONFIG, graph="auto", lengths=[0, 3], starts=[0, 0])
    assert made[0].replays == 3


def test_the_graph_that_was_used_longest_ago_goes_and_waits_longer(
    made: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_cache, "MOST_GRAPHS", 2)
    for tokens in (600, 600, 700, 700, 600, 800, 800):
        check(tokens=tokens)
    assert len(made) == 3 and len(graph_cache.GRAPHS) == 2
    for tokens in (600, 800):
        check(tokens=tokens)
    assert [graph.replays for graph in made] == [3, 1, 2]
    for _ in range(15):
        check(tokens=700)  # 15 sights since it was dropped
    assert len(made) == 3
    check(tokens=700)
    assert len(made) == 4 and len(graph_cache.GRAPHS) == 2


def test_shapes_that_take_turns_are_seldom_captured(made: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "MOST_GRAPHS", 1)
    for _ in range(20):
        for tokens in (520, 540):
            attend(*inputs(tokens=tokens), CONFIG, graph="auto")
    assert 2 <= len(made) <= 4


def test_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "_MOST_SIGHTS", 3)
    for tokens in range(520, 530):
        attend(*inputs(tokens=tokens), CONFIG, graph="auto")
        assert len(graph_cache.GRAPHS._sights) <= 3


def test_what_goes_without(made: list[Graph]) -> None:
    given, short = inputs(), FlexPrefillConfig(min_budget=1024)
    ways: list[dict[str, Any]] = [
        {"config": short},
        {"return_selection": True},
        {"mask_mod": lambda b, h, q, kv: q >= kv},
        {"score_mod": lambda score, b, h, q, kv: score},
    ]
    for _ in range(3):
        for way in ways:
            attend(*given, **{"config": CONFIG, **way}, graph="auto")
        with torch.autocast("cpu", torch.bfloat16):
            attend(*given, CONFIG, graph="auto")
        with torch.enable_grad(), pytest.raises(ValueError, match="query requires grad"):
            attend(given[0].clone().requires_grad_(), given[1], given[2], CONFIG, graph="auto")
    assert not made


def test_a_traced_call_goes_without(made: list[Graph]) -> None:
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, CONFIG, graph="auto"), fullgraph=True)
    for seed in range(3):
        found = compiled(*inputs(seed))
        torch.testing.assert_close(found, attend(*inputs(seed), CONFIG), atol=1e-5, rtol=1e-5)
    assert not made


def test_only_calls_on_a_gpu_have_a_stream_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert graph_cache.stream_for_graphs(inputs()[0], inputs()[1]) is None
    for _ in range(3):
        attend(*inputs(), CONFIG, graph="auto")
    assert len(graph_cache.GRAPHS) == 0


def test_too_little_memory_in_a_capture(made: list[Graph], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        check(tokens=600)
    Graph.fails = [torch.OutOfMemoryError("no room")]
    for seed in range(17):
        check(seed)  # the second cannot be captured
        assert len(graph_cache.GRAPHS) == (seed == 0)
    assert len(made) == 2 and "all graphs are dropped: no room" in caplog.text
    check()  # it came 16 times since
    assert len(made) == 3 and len(graph_cache.GRAPHS) == 1


def test_too_little_memory_in_a_replay(made: list[Graph]) -> None:
    for _ in range(3):
        check()
    Graph.fails = [torch.OutOfMemoryError("no room")]
    check(1)
    assert len(graph_cache.GRAPHS) == 0 and made[0].replays == 2
    check(2)


def test_too_little_memory_without_a_graph(made: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        check(tokens=600)
    whole, fails = dispatch.run, [True]

    def run(*arguments: Any) -> Any:
        if fails and fails.pop():
            raise torch.OutOfMemoryError("no room")
        return whole(*arguments)

    monkeypatch.setattr(dispatch, "run", run)
    out = attend(*inputs(), CONFIG, graph="auto")
    assert len(graph_cache.GRAPHS) == 0, "they gave way"
    assert torch.equal(out, attend(*inputs(), CONFIG))
    fails.append(True)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):  # nothing is left to drop
        attend(*inputs(tokens=500), CONFIG, graph="auto")
    check(tokens=500)


@pytest.mark.parametrize("error", [RuntimeError("not permitted when stream is capturing"), ValueError("it waits")])
def test_what_cannot_be_captured_is_tried_once(
    error: Exception, made: list[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    Graph.fails = [error]
    with caplog.at_level(logging.WARNING):
        for seed in range(30):
            check(seed)
    assert len(made) == 1 and caplog.text.count(str(error)) == 1
    for _ in range(2):
        check(tokens=600)  # another kind is
    assert len(made) == 2


def test_another_state_of_the_process(made: list[Graph]) -> None:
    for _ in range(3):
        check()
    torch.use_deterministic_algorithms(True)
    try:
        check(1)
        assert len(graph_cache.GRAPHS) == 0 and made[0].replays == 2
    finally:
        torch.use_deterministic_algorithms(False)


def test_graphs_are_released_by_name(made: list[Graph]) -> None:
    for _ in range(2):
        check()
    release_graphs()
    assert len(graph_cache.GRAPHS) == 0
    check(1)
    assert len(made) == 1
    check(2)
    assert len(made) == 2, "counted as before"


def test_threads_take_turns(made: list[Graph]) -> None:
    given = [inputs(seed) for seed in range(4)]
    expected = [attend(*one, CONFIG) for one in given]
    wrong = []

    def run(number: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(attend(*given[number], CONFIG, graph="auto"), expected[number]):
                    wrong.append(number)

    together([partial(run, number) for number in range(4)])
    assert not wrong and len(made) == 1 and made[0].replays == 79
