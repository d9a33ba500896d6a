"""Every argument that cannot be served gets an error that names it, before any kernel starts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compiled import graphs
from hf_models import tiny_model
from torch import Tensor

from flexprefill_fa import (
    FlashPrefillConfig,
    FlexPrefillConfig,
    create_block_mask,
    create_flexprefill_block_mask,
    select_blocks,
    share_heads,
    sparse_prefill_attention,
)

CONFIG = FlexPrefillConfig(gamma=0.5, min_budget=1)


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(2, 4, 300, 32),
        "key": torch.randn(2, 2, 400, 32),
        "value": torch.randn(2, 2, 400, 32),
    }


def raises(kind: type[Exception], message: str, **changes: Any) -> None:
    """The same error from the attention and, where it concerns them, from the selector and the mask."""
    arguments = {**good(), **changes}
    before = graphs()
    with pytest.raises(kind, match=re.escape(message)):
        sparse_prefill_attention(config=CONFIG, **arguments)
    if not {"value", "backend"} & set(changes):
        arguments.pop("value")
        with pytest.raises(kind, match=re.escape(message)):
            select_blocks(config=CONFIG, **arguments)
        with pytest.raises(kind, match=re.escape(message)):
            create_flexprefill_block_mask(config=CONFIG, **arguments)
    assert graphs() == before


def test_the_arguments_below_are_right_but_for_one() -> None:
    assert sparse_prefill_attention(config=FlexPrefillConfig(), **good()).shape == (2, 4, 300, 32)


def enable(config: Any) -> None:
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    enable_sparse_prefill(tiny_model("llama"), config)


TAKE_CONFIGS: dict[str, Any] = {
    "sparse_prefill_attention": lambda config: sparse_prefill_attention(**good(), config=config),
    "select_blocks": lambda config: select_blocks(good()["query"], good()["key"], config),
    "create_block_mask": lambda config: create_block_mask(good()["query"], good()["key"], config),
    "share_heads": share_heads,
    "enable_sparse_prefill": enable,
    "enable_sparse_prefill by layer": lambda config: enable({0: config}),
    "enable_sparse_prefill by function": lambda config: enable(lambda layer: config),
}


@pytest.mark.parametrize("takes", TAKE_CONFIGS.values(), ids=TAKE_CONFIGS)
def test_a_name_is_no_config(takes: Any) -> None:
    """Everywhere alike; the message has the config that is meant."""
    for config, kind, name, got in (
        ("flashprefill", "FlashPrefillConfig", "flashprefill", "'flashprefill'"),
        (FlashPrefillConfig, "FlashPrefillConfig", "flashprefill", "the class FlashPrefillConfig"),
        ("flash", "PeakPrefillConfig", "peakprefill", "'flash'"),
        ("flashprefill:alpha=0.1", "PeakPrefillConfig", "peakprefill", "'flashprefill:alpha=0.1'"),
        (0.9, "PeakPrefillConfig", "peakprefill", "float"),
    ):
        message = f"config must be a selector config such as {kind}() or get_selector({name!r})(), got {got}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            takes(config)
    with pytest.raises(TypeError, match=r"^config must be a FlexPrefillConfig, got 'flexprefill'$"):
        create_flexprefill_block_mask(good()["query"], good()["key"], config="flexprefill")  # pyright: ignore


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_not_a_tensor_of_the_right_shape(name: str) -> None:
    tensor: Tensor = good()[name]
    raises(TypeError, f"{name} must be a torch.Tensor, got list", **{name: [[1.0]]})
    raises(TypeError, f"{name} must be a torch.Tensor, got NoneType", **{name: None})
    message = f"{name} must have shape [batch, heads, length, head_dim], got {tuple(tensor[0].shape)}"
    raises(ValueError, message, **{name: tensor[0]})
    message = f"{name} must be one of torch.float32, torch.bfloat16, torch.float16, got torch.float64"
    raises(TypeError, message, **{name: tensor.double()})
    empty = tensor[:, :, :0]
    raises(ValueError, f"{name} must not be empty, got shape {tuple(empty.shape)}", **{name: empty})


def test_tensors_that_do_not_fit_each_other() -> None:
    query, key, value = good().values()
    raises(TypeError, "query and key must have one dtype, got torch.float32 and torch.float16", key=key.half())
    raises(TypeError, "key and value must have one dtype, got torch.float32 and torch.bfloat16", value=value.bfloat16())
    raises(ValueError, "query and key must have one batch size, got 2 and 1", key=key[:1])
    raises(ValueError, "query and key must have one head_dim, got 32 and 16", key=key[..., :16])
    raises(ValueError, "query heads must be a multiple of key heads, got 3 and 2", query=query[:, :3])
    raises(ValueError, "query heads must be a multiple of key heads, got 1 and 2", query=query[:, :1])
    raises(ValueError, "got 300 and 299", key=key[:, :, :299])
    raises(ValueError, "query length must not exceed key length", key=key[:, :, :299])
    message = "key and value must have one shape, got (2, 2, 400, 32) and (2, 2, 399, 32)"
    raises(ValueError, message, value=value[:, :, :399])
    raises(ValueError, "and (2, 4, 400, 32)", value=value.repeat(1, 2, 1, 1))


@pytest.mark.parametrize("dim", [8, 15, 257, 512])
def test_head_dim(dim: int) -> None:
    tensors: dict[str, Any] = {name: torch.randn(*tensor.shape[:3], dim) for name, tensor in good().items()}
    with pytest.raises(ValueError, match=rf"head_dim must be in \[16, 256\], got {dim}"):
        sparse_prefill_attention(config=CONFIG, **tensors)


def test_another_device() -> None:
    query, key, value = good().values()
    raises(ValueError, "query and key must be on one device, got cpu and meta", key=key.to("meta"))
    raises(ValueError, "query and key must be on one device, got meta and cpu", query=query.to("meta"))
    raises(ValueError, "key and value must be on one device, got cpu and meta", value=value.to("meta"))
    everywhere: dict[str, Any] = {name: tensor.to("meta") for name, tensor in good().items()}
    with pytest.raises(ValueError, match="sparse prefill runs on CUDA and CPU tensors, got meta"):
        sparse_prefill_attention(config=CONFIG, **everywhere)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_gradients(name: str) -> None:
    tensor = good()[name].requires_grad_()
    message = f"{name} requires grad, but sparse prefill is for inference only: call it under torch.no_grad()"
    raises(ValueError, message, **{name: tensor})
    with torch.no_grad():
        out = sparse_prefill_attention(config=FlexPrefillConfig(), **{**good(), name: tensor})
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        (float("nan"), ValueError, "scale must be a positive finite number, got nan"),
        (float("inf"), ValueError, "scale must be a positive finite number, got inf"),
        (0, ValueError, "scale must be a positive finite number, got 0"),
        (-0.1, ValueError, "scale must be a positive finite number, got -0.1"),
        ("0.1", TypeError, "scale must be a number or None, got str"),
        (True, TypeError, "scale must be a number or None, got bool"),
    ],
)
def test_scale(scale: Any, kind: type[Exception], message: str) -> None:
    raises(kind, message, scale=scale)


@pytest.mark.parametrize(("name", "low", "high"), [("starts", 0, 399), ("lengths", 1, 400)])
def test_padding_arguments(name: str, low: int, high: int) -> None:
    raises(ValueError, f"{name} must have shape [batch] = [2], got [3]", **{name: [1, 2, 3]})
    raises(ValueError, f"{name} must have shape [batch] = [2], got [2, 1]", **{name: torch.ones(2, 1).int()})
    raises(TypeError, f"{name} must be int32 or int64, got torch.float32", **{name: torch.ones(2)})
    raises(TypeError, f"{name} must be int32 or int64, got torch.bool", **{name: torch.ones(2).bool()})
    raises(TypeError, f"{name} must be an integer, got float 1.5", **{name: [1, 1.5]})
    raises(TypeError, f"{name} must be an integer tensor or a sequence of ints, got int", **{name: 5})
    raises(TypeError, f"{name} must be an integer tensor or a sequence of ints, got str", **{name: "12"})
    message = f"{name} must be in [{low}, {high}], got [1, {high + 1}]"
    raises(ValueError, message, **{name: torch.tensor([1, high + 1])})
    raises(ValueError, message, **{name: [1, high + 1]})
    raises(ValueError, f"{name} must be at least {low}, got {low - 1}", **{name: [1, low - 1]})
    message = f"{name} must be on the query's device cpu or on the CPU, got meta"
    raises(ValueError, message, **{name: torch.ones(2, dtype=torch.int32, device="meta")})


def test_starts_and_lengths_past_the_end() -> None:
    message = "starts + lengths must not exceed the key length 400, got [0, 100] + [400, 301]"
    raises(ValueError, message, starts=[0, 100], lengths=[400, 301])


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash", "backend must be one of ('auto', 'TRITON', 'FLASH', 'CPU'), got 'flash'"),
        (None, "backend must be one of ('auto', 'TRITON', 'FLASH', 'CPU'), got None"),
        ("TRITON", "backend='TRITON' cannot run on tensors on cpu"),
        ("FLASH", "backend='FLASH' cannot run: it needs a CUDA GPU, got tensors on cpu"),
    ],
)
def test_backend(backend: Any, message: str) -> None:
    raises(ValueError, message, backend=backend)


@pytest.mark.parametrize("config", [None, "flexprefill", {"gamma": 0.9}])
def test_config_of_a_wrong_type(config: Any) -> None:
    with pytest.raises(TypeError, match="config must be"):
        sparse_prefill_attention(config=config, **good())
