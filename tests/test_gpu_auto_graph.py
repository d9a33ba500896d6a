"""On a CUDA GPU: calls with graph="auto" equal those without, whatever comes between them."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from every_selector import example
from threads import together
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import (
    FlexPrefillConfig,
    PrefillGraph,
    Selector,
    cuda_graphs,
    get_selector,
    graph_cache,
    release_graphs,
    selector_names,
    sparse_prefill_attention,
)
from flexprefill_fa.dense import causal_attention

pytestmark = pytest.mark.gpu

CONFIG = FlexPrefillConfig(min_budget=256, gamma=0.8)
Three = tuple[Tensor, Tensor, Tensor]


def inputs(seed: int = 0, tokens: int = 1500, batch: int = 1, heads: int = 4, dim: int = 64) -> Three:
    made = structured_qk(batch, heads, heads // 2, tokens, tokens, dim, seed=seed)
    query, key = (x.to("cuda", torch.bfloat16) for x in made)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))
    return query, key, value.to("cuda", torch.bfloat16)


def call(given: Three, config: Selector = CONFIG, graph: str = "auto", **arguments: Any) -> Tensor:
    return sparse_prefill_attention(*given, config=config, dense="never", graph=graph, **arguments)


def check(seed: int = 0, **arguments: Any) -> None:
    given = inputs(seed)
    assert torch.equal(call(given, **arguments), call(given, graph="never", **arguments))


def held() -> int:
    return len(graph_cache.GRAPHS)


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(graph_cache, "GRAPHS", graph_cache.GraphCache())
    with torch.no_grad():
        yield
    release_graphs()
    assert not torch.cuda.is_current_stream_capturing()
    torch.randn(3, device="cuda")  # torch's generator still works


@pytest.mark.parametrize("name", selector_names())
def test_every_selector(name: str) -> None:
    """The same numbers as without a graph, which are not dense attention's, in memory of each call's own."""
    config = example(name, 128)
    given = [inputs(seed, dim=128) for seed in range(5)]
    outs = [call(one, config) for one in given]
    assert held() == 1
    for one, out in zip(given, outs, strict=True):
        assert torch.equal(out, call(one, config, "never"))
        assert (out - causal_attention(*one)).abs().max() > 0.05
    assert len({out.data_ptr() for out in outs}) == 5


@pytest.mark.parametrize("name", selector_names())
def test_the_cpu_needs_less(name: str) -> None:
    """Microseconds until the GPU has its work at 4K tokens, 32/8 heads of 128; shown by `pytest -s`."""
    query, key = (torch.randn(1, heads, 4096, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8))
    given, config = (query, key, torch.randn_like(key)), get_selector(name)()
    found = {}
    for graph in ("never", "auto"):
        times = []
        for turn in range(60):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            call(given, config, graph)
            if turn >= 10:
                times.append((time.perf_counter_ns() - start) / 1000)
        found[graph] = statistics.median(times)
    print({"selector": name, **found})
    assert held() == 1 and found["auto"] < found["never"]


def test_a_prompt_that_runs_dense_costs_the_cpu_little_more_than_sdpa() -> None:
    """Microseconds, shown by `pytest -s`: 4K tokens, 32/8 heads of 128; room for tests beside it."""
    query, key = (torch.randn(1, heads, 4096, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8))
    value, short = torch.randn_like(key), FlexPrefillConfig(min_budget=4096)
    found = []
    ways: list[Callable[[], Tensor]] = [
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        lambda: sparse_prefill_attention(query, key, value, short),
    ]
    for way in ways:
        times = []
        for turn in range(120):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            way()
            if turn >= 20:
                times.append((time.perf_counter_ns() - start) / 1000)
        found.append(statistics.median(times))
    print({"sdpa": found[0], "dense auto": found[1]})
    assert found[1] - found[0] < 500


@pytest.mark.parametrize("place", [{"lengths": 1}, {"starts": 1}, {"starts": 1, "lengths": 1}], ids=str)
def test_padding_is_that_of_each_call(place: dict[str, int]) -> None:
    given = inputs(batch=2)
    for turn in range(4):
        first, second = 40 * turn, 300 - 60 * turn
        every = {"starts": [first, second], "lengths": [1500 - first, 1200 - second]}
        padding: dict[str, Any] = {name: every[name] for name in place}
        out, expected = call(given, **padding), call(given, graph="never", **padding)
        for b in range(2):
            start = padding.get("starts", [0, 0])[b]
            end = start + padding["lengths"][b] if "lengths" in padding else 1500
            assert torch.equal(out[b, :, start:end], expected[b, :, start:end])
    assert held() == 1


def test_a_rule_that_waits_for_the_gpu_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    stream = torch.cuda.current_stream()
    for seed in range(4):
        given = inputs(seed)
        out = call(given, example("xattention", 128), lengths=[1400])
        expected = call(given, example("xattention", 128), "never", lengths=[1400])
        assert torch.equal(out[:, :, :1400], expected[:, :, :1400])
    assert held() == 0 and caplog.text.count("no CUDA graph can hold this call: it waits for the GPU") == 1
    assert torch.cuda.current_stream() == stream
    torch.randn(3, device="cuda")


def test_streams_have_graphs_of_their_own() -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    given = [inputs(seed, tokens=4000) for seed in range(2)]
    expected = [call(one, graph="never") for one in given]
    torch.cuda.synchronize()
    outs: list[tuple[int, Tensor]] = []
    for turn in range(10):
        with torch.cuda.stream(streams[turn % 2]):  # no stream waits for the other
            outs.append((turn % 2, call(given[turn % 2])))
    torch.cuda.synchronize()
    assert held() == 2 and all(torch.equal(out, expected[which]) for which, out in outs)


def test_threads_take_turns() -> None:
    given = [inputs(seed) for seed in range(4)]
    expected = [call(one, graph="never") for one in given]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(call(given[number]), expected[number]):
                    wrong.append(number)

    together([partial(run, number) for number in range(4)])
    assert not wrong and held() == 1


def test_within_a_capture_of_the_callers_it_is_part_of_that() -> None:
    static, other = inputs(1), inputs(2)
    for _ in range(3):
        call(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)
    for mine, theirs in zip(static, other, strict=True):
        mine.copy_(theirs)
    expected = call(other, graph="never")
    graph.replay()
    assert torch.equal(out, expected)


def test_traced_it_goes_without() -> None:
    compiled = torch.compile(lambda query, key, value: call((query, key, value)), fullgraph=True)
    for seed in range(3):
        found, expected = compiled(*inputs(seed)), call(inputs(seed), graph="never")
        assert (found - expected).abs().max() < 0.02 and held() == 0


def test_inference_mode_and_gradients() -> None:
    for inference in (True, False, True, False, True):
        with torch.inference_mode(inference), torch.no_grad():
            check()
    assert held() == 2
    needs = inputs()[0].requires_grad_()
    assert not call((needs, *inputs()[1:])).requires_grad
    with torch.enable_grad(), pytest.raises(ValueError, match="query requires grad"):
        call((needs, *inputs()[1:]))
    with torch.inference_mode():
        graph = PrefillGraph(*inputs(), CONFIG, dense="never")
    assert torch.equal(graph(*inputs(1)), call(inputs(1), graph="never"))


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_too_little_memory_in_a_capture(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either warm-up, and in the captured call; then the call goes without, and another kind is captured."""
    turns: list[bool] = []
    whole = cuda_graphs.sparse_prefill_attention

    def greedy(query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        turns.append(torch.cuda.is_current_stream_capturing())
        out = whole(query, *arguments, **named)
        if len(turns) == turn:
            torch.empty(2**46, dtype=torch.uint8, device=query.device)
        return out

    monkeypatch.setattr(cuda_graphs, "sparse_prefill_attention", greedy)
    for seed in range(3):
        check(seed)
    assert turns == [False, False, True][:turn] and held() == 0
    for seed in range(3):
        check(seed, scale=0.2)
    assert held() == 1


def test_too_little_memory_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        check(seed)
    replay = PrefillGraph.__call__

    def greedy(self: PrefillGraph, *arguments: Any, **named: Any) -> Tensor:
        replay(self, *arguments, **named)
        return torch.empty(2**46, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(PrefillGraph, "__call__", greedy)
    check(1)
    assert held() == 0
    monkeypatch.undo()
    check(2)


def test_what_a_graph_holds_is_given_back() -> None:
    """Not more than is documented: copies of query, key and value, an output, and some MB."""
    query, key = (torch.randn(1, heads, 4096, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8))
    given = query, key, torch.randn_like(key)
    call(given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        call(given)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() - before
    copies = 2 * query.nbytes + 2 * key.nbytes
    print({"copies_mb": copies / 1e6, "held_mb": taken / 1e6})
    assert held() == 1 and 2 * query.nbytes <= taken <= copies + 64 * 2**20
    release_graphs()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 4 * 2**20


def test_a_graph_made_by_hand() -> None:
    config = FlexPrefillConfig(min_budget=256, gamma=0.8)
    graph = PrefillGraph(*inputs(), config, dense="never", lengths=[1400])
    for lengths in ([1100], None, [1500]):
        out = graph(*inputs(1), lengths=lengths)
        real = (lengths or [1400])[0]
        assert torch.equal(out[:, :, :real], call(inputs(1), graph="never", lengths=lengths or [1400])[:, :, :real])
    with pytest.raises(ValueError, match="captured without starts"):
        graph(*inputs(1), starts=[100])
    object.__setattr__(config, "gamma", 0.9)
    with pytest.raises(ValueError, match="the config was changed since"):
        graph(*inputs(1))
    with pytest.raises(ValueError, match="it waits for the GPU"):
        PrefillGraph(*inputs(), example("xattention", 128), dense="never", lengths=[1400])


def test_the_documented_code_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    section = text[text.index("## A CUDA graph\n") : text.index("## Looking at selections")]
    automatic, by_hand = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    exec(automatic, names)
    assert torch.isfinite(names["out"]).all()
    names |= {f"other_{name}": torch.randn_like(names[name]) for name in ("query", "key", "value")}
    exec(by_hand, names)
    assert torch.isfinite(names["out"]).all()
