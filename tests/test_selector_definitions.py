"""What a class that is no good selector is told, when it is made or when it is first used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from oracle import causal_oracle, relative_error
from torch import Tensor
from workloads import random_qk

from flexprefill_fa import (
    Selector,
    VerticalSlashConfig,
    default_selector,
    get_selector,
    select_blocks,
    selector_names,
    sparse_prefill_attention,
)
from flexprefill_fa.masks import selector as selector_module
from flexprefill_fa.masks.element import Element


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test defines is forgotten after it."""
    monkeypatch.setattr(selector_module, "_OPERATORS", dict(selector_module._OPERATORS))
    monkeypatch.setattr(selector_module, "_REGISTRY", dict(selector_module._REGISTRY))


def test_a_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match=r"^the selector 'flexprefill' is there already: flexprefill_fa\.masks\."):

        class Mine(Selector, name="flexprefill"):
            pass

    assert get_selector("flexprefill").__name__ == "FlexPrefillConfig"


def test_a_class_without_a_name() -> None:
    with pytest.raises(TypeError, match=r"^class Mine needs a name: expected class Mine\(Selector, name=\.\.\.\)"):

        class Mine(Selector):
            pass


@pytest.mark.parametrize("name", ["", "Mine", "my-rule", "1st", "a b"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"lower case letters, digits and _, got {name!r}"):

        class Mine(Selector, name=name):
            pass

    assert name not in selector_names()


@pytest.mark.parametrize("kind", [str, list[int], Tensor, dict, int | float, int | str | None, object])
def test_a_field_that_does_not_travel(kind: Any) -> None:
    body = {"__annotations__": {"alpha": float, "words": kind}, "alpha": 0.1, "words": None}
    with pytest.raises(TypeError, match=r"^Mine\.words cannot travel as a number: expected bool, int, float or"):
        type("Mine", (Selector,), body, name="travels_not")
    assert "travels_not" not in selector_names()


def test_fields_that_travel() -> None:
    @dataclass(frozen=True)
    class Mine(Selector, name="travels"):
        flag: bool = True
        count: int = 3
        share: float = 0.25
        most: int | None = None
        mode: Literal["a", "b", "c"] = "b"
        other: Literal[4, 8] | None = 8

    others: dict[str, Any] = {
        "flag": False,
        "count": 2**40,
        "share": 1e-9,
        "most": 7,
        "mode": "c",
        "other": None,
        "block_size": 64,
    }
    for config in (Mine(), Mine(**others), Mine(True, -3, -0.5, None, "a", 4)):
        back = Mine.from_settings(config.settings(), config.block_size)
        assert back == config and all(
            type(a) is type(b) for a, b in zip(vars(back).values(), vars(config).values(), strict=True)
        )
    assert Mine.from_settings(Mine().settings(), 128) is Mine.from_settings(Mine().settings(), 128), "made once"


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"share": float("nan")}, ValueError, r"Mine\.share must be finite, got nan"),
        ({"share": float("inf")}, ValueError, r"Mine\.share must be finite, got inf"),
        ({"share": "0.5"}, TypeError, r"Mine\.share must be a number, got str '0.5'"),
        ({"mode": "c"}, ValueError, r"Mine\.mode must be one of \('a', 'b'\), got 'c'"),
        ({"share": None}, TypeError, r"Mine\.share must be a number, got NoneType None"),
    ],
)
def test_values_that_do_not_travel(fields: dict[str, Any], kind: type, message: str) -> None:
    @dataclass(frozen=True)
    class Mine(Selector, name="values"):
        share: float = 0.5
        mode: Literal["a", "b"] = "a"

        def keep(self, element: Element) -> Tensor:
            return element.visible().expand(element.heads, -1, -1)

    query, key = random_qk(1, 2, 1, 300, 300, 16)
    with pytest.raises(kind, match=message):
        select_blocks(query, key, Mine(**fields))


def test_a_class_that_is_no_frozen_dataclass() -> None:
    class Plain(Selector, name="plain"):
        share: float = 0.5

    with pytest.raises(TypeError, match=r"^Plain must be a frozen dataclass: put @dataclass\(frozen=True\) above it"):
        Plain()

    @dataclass
    class Thawed(Selector, name="thawed"):
        share: float = 0.5

    query, key = random_qk(1, 2, 1, 300, 300, 16)
    with pytest.raises(TypeError, match=r"^Thawed must be a frozen dataclass"):
        select_blocks(query, key, Thawed())


def wrong(keep: Any) -> Any:
    @dataclass(frozen=True)
    class Wrong(Selector, name="wrong"):
        def keep(self, element: Element) -> Any:
            return keep(element)

    return Wrong()


@pytest.mark.parametrize(
    ("keep", "kind", "message"),
    [
        (lambda e: None, TypeError, r"Wrong\.keep must return a bool tensor, got NoneType"),
        (lambda e: e.visible().float(), TypeError, r"Wrong\.keep must return a bool tensor, got torch\.float32"),
        (lambda e: e.visible(), ValueError, r"Wrong\.keep must return shape \[H, nq, nk\] = \(4, 3, 3\), got \(3, 3\)"),
        (lambda e: e.visible()[None], ValueError, r"= \(4, 3, 3\), got \(1, 3, 3\)"),
        (lambda e: e.visible().expand(4, -1, -1)[..., :2], ValueError, r"= \(4, 3, 3\), got \(4, 3, 2\)"),
    ],
)
def test_a_rule_that_returns_something_else(keep: Any, kind: type, message: str) -> None:
    query, key = random_qk(1, 4, 2, 300, 300, 16)
    with pytest.raises(kind, match=message):
        select_blocks(query, key, wrong(keep))


def test_a_class_without_a_rule() -> None:
    @dataclass(frozen=True)
    class Empty(Selector, name="empty"):
        pass

    query, key = random_qk(1, 4, 2, 300, 300, 16)
    with pytest.raises(NotImplementedError, match=r"Empty must define keep\(element\)"):
        select_blocks(query, key, Empty())


def test_reports() -> None:
    def keep(element: Element) -> Tensor:
        element.report("surprise", torch.ones(4))
        return element.visible().expand(4, -1, -1)

    query, key = random_qk(1, 4, 2, 300, 300, 16)
    with pytest.raises(ValueError, match=r"Wrong\.keep reports surprise, but its class declares \(\)"):
        select_blocks(query, key, wrong(keep))

    @dataclass(frozen=True)
    class Telling(Selector, name="telling"):
        diagnostics = ("heads", "keys")

        def keep(self, element: Element) -> Tensor:
            element.report("keys", torch.full((4,), float(element.grid.real_keys)))
            return element.visible().expand(4, -1, -1)

    query, key = random_qk(2, 4, 2, 300, 300, 16)
    found = select_blocks(query, key, Telling(), lengths=[300, 200]).diagnostics
    assert found["keys"].tolist() == [[300.0] * 4, [200.0] * 4] and found["heads"].tolist() == [[0.0] * 4] * 2


def test_the_future_does_not_matter_and_the_own_blocks_are_kept() -> None:
    query, key = random_qk(1, 4, 2, 300, 700, 16)
    nothing = select_blocks(query, key, wrong(lambda e: ~e.visible().expand(4, -1, -1)))
    assert nothing.kept_blocks().tolist() == [[9 - 1] * 4], "three rows: the first block and two of its own, all seen"


@pytest.mark.parametrize(
    "name", ["keep", "operator", "settings", "sweep", "name", "scale", "selector", "mean_correction"]
)
def test_field_names_that_are_taken(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^Mine\.{name} is a name that selectors need themselves"):
        type("Mine", (Selector,), {"__annotations__": {name: float}, name: 0.5}, name="clashes")
    assert "clashes" not in selector_names()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 2.7}, "Mine.count must be a int, got float 2.7"),
        ({"count": True}, "Mine.count must be a int, got bool True"),
        ({"count": 2**60 + 1}, "Mine.count must be a int, got int "),
        ({"flag": 1}, "Mine.flag must be a bool, got int 1"),
    ],
)
def test_values_of_another_type(fields: dict[str, Any], message: str) -> None:
    @dataclass(frozen=True)
    class Mine(Selector, name="typed"):
        count: int = 2
        flag: bool = False

    with pytest.raises(TypeError, match=message):
        Mine(**fields).settings()


def define_near(count: int, names: tuple[str, ...] = ()) -> Any:
    @dataclass(frozen=True)
    class Near(Selector, name="near"):
        diagnostics = names

        def keep(self, element: Element) -> Tensor:
            first, _ = element.diagonal()
            block = torch.arange(element.grid.kv_blocks)
            return (first[:, None] - block < count).expand(element.heads, -1, -1)

    return Near


def test_a_class_that_is_defined_again() -> None:
    """As by a notebook's cell: the new rule counts, and configs of the old one are told."""
    query, key = random_qk(1, 2, 1, 1500, 1500, 16)
    old = define_near(1)()
    few = select_blocks(query, key, old).density().mean()
    assert select_blocks(query, key, define_near(6)()).density().mean() > few + 0.1
    with pytest.raises(ValueError, match=r"^Near was defined again since this config was made: make a new one"):
        select_blocks(query, key, old)
    with pytest.raises(ValueError, match=r"'near' was defined with diagnostics \(\) and triton None"):
        define_near(1, ("more",))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ((), "peakprefill"),
        (("peak", "per_block"), "peakprefill"),
        (("block_size",), "peakprefill"),
        (("gamma",), "flexprefill"),
        (("min_budget", "block_size"), "flexprefill"),
        (("alpha",), "peakprefill"),  # which refuses it
        (("gamma", "peak"), "peakprefill"),
    ],
)
def test_the_selector_that_is_meant_without_a_name(settings: tuple[str, ...], name: str) -> None:
    assert default_selector(settings) == name


def test_slots() -> None:
    @dataclass(frozen=True, slots=True)
    class Slotted(Selector, name="slotted"):
        count: int = 3

    assert get_selector("slotted") is Slotted
    assert Slotted.from_settings(Slotted(5).settings(), 128) == Slotted(5)


def test_kernels_are_not_those_of_another_rule() -> None:
    class Other(VerticalSlashConfig, name="other_rule"):
        def keep(self, element: Element) -> Tensor:
            return element.visible().expand(element.heads, -1, -1)

    class Same(VerticalSlashConfig, name="same_rule"):
        pass

    assert Other.triton is None and Same.triton == VerticalSlashConfig.triton is not None


def test_a_rule_may_return_any_strides() -> None:
    """The lists are what the operator promised torch.compile, and the blocks are computed."""

    @dataclass(frozen=True)
    class Mine(Selector, name="strided_result"):
        def keep(self, element: Element) -> Tensor:
            grid = element.grid
            return torch.zeros(grid.q_blocks, grid.kv_blocks, element.heads, dtype=torch.bool).permute(2, 0, 1)

    query, key = random_qk(1, 2, 2, 700, 700, 32)
    selection = select_blocks(query, key, Mine())
    assert selection.kv_indices.stride() == selection.full_kv_indices.stride() == (2 * 6 * 10, 6 * 10, 10, 1)
    out = sparse_prefill_attention(query, key, key, Mine(), dense="never")
    expected, _, real = causal_oracle(query, key, key, selection)
    assert relative_error(out, expected, real) < 1e-5
