"""Calls that are alike are checked and planned once, and no other ones are taken for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, PeakPrefillConfig, calls, dispatch, sparse_prefill_attention
from flexprefill_fa.dense import causal_attention

CONFIG = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
SHORT = FlexPrefillConfig(min_budget=1024)  # dense


def inputs(tokens: int = 700, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    query, key = structured_qk(batch, 4, 2, tokens, tokens, 32, seed=seed)
    return query, key, torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The selectors of the calls that were planned."""
    found: list[Any] = []
    prepare = dispatch.prepare

    def recorded(query: Tensor, key: Tensor, selector: Any, *more: Any) -> Any:
        found.append(selector)
        return prepare(query, key, selector, *more)

    monkeypatch.setattr(dispatch, "prepare", recorded)
    return found


def alone(given: Any, config: Any, **arguments: Any) -> Tensor:
    """The call, planned anew."""
    before = calls._known.copy()
    calls._known.clear()
    out = sparse_prefill_attention(*given, config=config, **arguments)
    calls._known.clear()
    calls._known.update(before)
    return out


@pytest.mark.parametrize("config", [CONFIG, SHORT], ids=["sparse", "dense"])
@torch.no_grad()
def test_other_values_are_the_same_kind(config: FlexPrefillConfig, planned: list[Any]) -> None:
    outs = [sparse_prefill_attention(*inputs(seed=seed), config) for seed in range(3)]
    assert planned == [config]
    for seed, out in enumerate(outs):
        dense = causal_attention(*inputs(seed=seed))
        assert torch.equal(out, alone(inputs(seed=seed), config))
        assert torch.allclose(out, dense, atol=1e-5) == (config is SHORT)


@torch.no_grad()
def test_what_is_another_kind(planned: list[Any]) -> None:
    given = inputs()
    padded = inputs(batch=2)
    others: list[tuple[Any, Any, dict[str, Any]]] = [
        (given, CONFIG, {}),
        (inputs(500), CONFIG, {}),
        ((given[0][:, :, 300:], *given[1:]), CONFIG, {}),
        (tuple(x.bfloat16() for x in given), CONFIG, {}),
        ((given[0], given[1][:, :1], given[2][:, :1]), CONFIG, {}),
        (given, FlexPrefillConfig(gamma=0.8, tau=0.0, min_budget=1), {}),
        (given, FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1, block_size=64), {}),
        (given, PeakPrefillConfig(), {}),
        (given, SHORT, {}),
        (given, SHORT, {"dense": "never"}),
        (given, CONFIG, {"scale": 0.3}),
        (given, CONFIG, {"backend": "CPU"}),
        (padded, CONFIG, {}),
        (padded, CONFIG, {"starts": [0, 130]}),
        (padded, CONFIG, {"lengths": [700, 500]}),
        (padded, CONFIG, {"starts": [0, 130], "lengths": [700, 500]}),
    ]
    for tensors, config, arguments in others:
        sparse_prefill_attention(*tensors, config=config, **arguments)
    assert planned == [config for _, config, _ in others]
    for tensors, config, arguments in others:
        before = len(planned)
        out = sparse_prefill_attention(*tensors, config=config, **arguments)
        assert len(planned) == before
        assert torch.equal(out, alone(tensors, config, **arguments))


@torch.no_grad()
def test_padding_is_read_and_checked_each_time(planned: list[Any]) -> None:
    given = inputs(batch=2)
    for lengths in ([700, 500], [400, 700]):
        out, selection = sparse_prefill_attention(*given, CONFIG, lengths=lengths, return_selection=True)
        assert selection.lengths is not None and selection.lengths.tolist() == lengths
        assert torch.equal(out, alone(given, CONFIG, lengths=lengths))
    assert len(planned) == 3  # one of them ours, and two anew
    for lengths in ([0, 700], [700, 701], [700]):
        with pytest.raises(ValueError, match="lengths must"):
            sparse_prefill_attention(*given, CONFIG, lengths=lengths)


@torch.no_grad()
def test_a_config_that_was_changed(planned: list[Any]) -> None:
    given, config = inputs(), FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
    first = sparse_prefill_attention(*given, config)
    object.__setattr__(config, "gamma", 0.9)
    second = sparse_prefill_attention(*given, config)
    assert len(planned) == 2 and not torch.allclose(first, second, atol=1e-3)
    object.__setattr__(config, "gamma", True)  # as a number it is the 1.0 of no setting
    with pytest.raises(TypeError, match="gamma must be a float"):
        sparse_prefill_attention(*given, config)


def test_errors_are_those_of_a_first_call() -> None:
    given = inputs()
    with torch.no_grad():
        sparse_prefill_attention(*given, CONFIG, scale=1.0, mean_correction=False)
        wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"scale": True}, TypeError, "scale must be a number"),
            ({"scale": 1.0, "mean_correction": 0}, ValueError, "mean_correction must be"),
            ({"scale": 1.0, "mean_correction": []}, ValueError, "mean_correction must be"),
            ({"scale": 1.0, "dense": ["auto"]}, ValueError, "dense must be one of"),
            ({"scale": 1.0, "backend": "TRITON"}, ValueError, "backend='TRITON' cannot run"),
        ]
        for arguments, kind, message in wrong:
            with pytest.raises(kind, match=message):
                sparse_prefill_attention(*given, CONFIG, **arguments)
        with pytest.raises(TypeError, match="config must be a selector config"):
            sparse_prefill_attention(*given, 3, scale=1.0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=r"value must be a torch\.Tensor"):
            sparse_prefill_attention(*given[:2], None, CONFIG, scale=1.0)  # pyright: ignore[reportArgumentType]
    needs = given[2].clone().requires_grad_()
    with pytest.raises(ValueError, match="value requires grad"):
        sparse_prefill_attention(*given[:2], needs, CONFIG, scale=1.0)


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("place", "change", "arguments"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), same, {}),
        (Passing, same, {}),
        (contextlib.nullcontext, lambda x: torch.nn.Parameter(x, requires_grad=False), {}),
        (contextlib.nullcontext, same, {"mask_mod": lambda b, h, q, kv: q >= kv}),
        (contextlib.nullcontext, same, {"score_mod": lambda score, b, h, q, kv: score}),
    ],
    ids=["autocast", "mode", "subclass", "mask_mod", "score_mod"],
)
@torch.no_grad()
def test_what_is_planned_each_time(
    place: Callable[[], AbstractContextManager], change: Callable[[Tensor], Tensor], arguments: Any, planned: list[Any]
) -> None:
    with place():
        for _ in range(2):
            query, key, value = map(change, inputs())
            sparse_prefill_attention(query, key, value, SHORT, **arguments)
    assert len(planned) == 2 and not calls._known


@torch.no_grad()
def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MOST", 3)
    for tokens in range(10, 20):
        given = inputs(tokens)
        torch.testing.assert_close(sparse_prefill_attention(*given, SHORT), causal_attention(*given))
        assert 0 < len(calls._known) <= 3


@torch.no_grad()
def test_what_a_config_keeps_beside_its_fields_counts_for_nothing(planned: list[Any]) -> None:
    config = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
    for kept in ([1], {"a": 2}):
        object.__setattr__(config, "kept", kept)  # as functools.cached_property does
        sparse_prefill_attention(*inputs(), config)
    assert planned == [config]
