"""What a PrefillGraph keeps, copies and refuses, with a stand-in for the CUDA graph that runs the call again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, PrefillGraph, cuda_graphs, sparse_prefill_attention

Three = tuple[Tensor, Tensor, Tensor]


def inputs(seed: int = 0, batch: int = 1, tokens: int = 700) -> Three:
    query, key = structured_qk(batch, 4, 2, tokens, tokens, 32, seed=seed)
    return query, key, torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))


def config() -> FlexPrefillConfig:
    return FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(call: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        out = torch.full_like(call(), torch.nan)
        return SimpleNamespace(replay=lambda: out.copy_(call())), out

    monkeypatch.setattr(cuda_graphs, "_check_device", lambda query: None)
    monkeypatch.setattr(cuda_graphs, "_capture", capture)


@torch.no_grad()
def test_it_follows_values_and_strides_and_overwrites_its_output() -> None:
    graph = PrefillGraph(*inputs(), config())
    first = graph(*inputs(1))
    assert torch.equal(first, sparse_prefill_attention(*inputs(1), config()))
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2))
    assert graph(query, key, value) is first
    assert torch.equal(first, sparse_prefill_attention(*inputs(2), config()))


@torch.no_grad()
def test_padding_of_a_replay_is_its_own() -> None:
    given = inputs(batch=2)
    graph = PrefillGraph(*given, config(), lengths=[700, 300])
    for lengths in ([500, 700], None, [1, 2]):
        expected = sparse_prefill_attention(*given, config(), lengths=lengths or [700, 300])
        out = graph(*given, lengths=lengths)
        for b, length in enumerate(lengths or [700, 300]):
            assert torch.equal(out[b, :, :length], expected[b, :, :length])
    with pytest.raises(ValueError, match="captured without starts, got starts"):
        graph(*given, starts=[0, 100])
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 700\]"):
        graph(*given, lengths=torch.tensor([701, 1]))
    example = torch.tensor([700, 300], dtype=torch.int32)
    graph = PrefillGraph(*given, config(), lengths=example)
    example.fill_(1)
    expected = sparse_prefill_attention(*given, config(), lengths=[700, 300])
    assert torch.equal(graph(*given)[0], expected[0]), "the example's memory is the caller's"


@torch.no_grad()
def test_what_a_graph_is_not_for() -> None:
    given, changed = inputs(), config()
    graph = PrefillGraph(*given, changed)
    with pytest.raises(ValueError, match=r"captured for a query of \(\(1, 4, 700, 32\).*got \(\(1, 4, 600"):
        graph(*inputs(tokens=600))
    with pytest.raises(ValueError, match=r"captured for a query of .*float32.*got .*float16"):
        graph(given[0].half(), given[1].half(), given[2].half())
    with torch.enable_grad(), pytest.raises(ValueError, match="value requires grad"):
        graph(given[0], given[1], given[2].clone().requires_grad_())
    object.__setattr__(changed, "gamma", 0.9)
    with pytest.raises(ValueError, match=r"the config was changed since .*'gamma': 0\.4.*got .*'gamma': 0\.9"):
        graph(*given)
    object.__setattr__(changed, "gamma", 0.4)
    assert torch.equal(graph(*given), sparse_prefill_attention(*given, changed))
    with pytest.raises(ValueError, match="got return_selection=True"):
        PrefillGraph(*given, changed, return_selection=True)
    with pytest.raises(ValueError, match="a PrefillGraph is a graph already, got graph='auto'"):
        PrefillGraph(*given, changed, graph="auto")


@pytest.mark.parametrize("made", [True, False])
def test_inference_mode_may_come_and_go(made: bool) -> None:
    with torch.inference_mode(made):
        given = inputs()
        with torch.no_grad():
            graph = PrefillGraph(*given, config(), lengths=[600])
    with torch.inference_mode(not made), torch.no_grad():
        out = graph(*inputs(1), lengths=[650])
        expected = sparse_prefill_attention(*inputs(1), config(), lengths=[650])
        assert torch.equal(out[:, :, :650], expected[:, :, :650])


def test_a_call_that_waits_is_refused_before_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = [1]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        assert modes[-1] == "warn"
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    cuda_graphs._check_that_nothing_waits(lambda: warnings.warn("something else", stacklevel=1))
    for _ in range(2):  # not once for each place that warns
        with pytest.raises(ValueError, match="no CUDA graph can hold this call: it waits for the GPU"):
            cuda_graphs._check_that_nothing_waits(waits)
        assert modes[-1] == 1
    other = threading.Thread(target=waits)
    cuda_graphs._check_that_nothing_waits(lambda: (other.start(), other.join()))
