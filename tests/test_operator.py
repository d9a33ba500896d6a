"""The custom operators under torch.library.opcheck, and the shapes that tracing sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from workloads import structured_qk

import flexprefill_fa.integrations.transformers  # noqa: F401  defines sequence_ids
from flexprefill_fa import FlexPrefillConfig, select_blocks

SELECT: Any = torch.ops.flexprefill_fa.select_flexprefill.default
POSITIONS = torch.ops.flexprefill_fa.positions.default
SEQUENCE_IDS = torch.ops.flexprefill_fa.sequence_ids.default


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def select_arguments(
    q_len: int,
    kv_len: int,
    *,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    all_partial: bool = False,
    **fields: Any,
) -> tuple[Any, ...]:
    query, key = structured_qk(2, 4, 2, q_len, kv_len, 16)
    starts, lengths = (int32(0, 77), int32(kv_len - 50, kv_len - 100)) if padded else (None, None)
    config = FlexPrefillConfig(**{"gamma": 0.8, "min_budget": 1, "block_size": 64, **fields})
    zero_tails = True  # opcheck compares whole outputs
    return (
        *(query.to(dtype), key.to(dtype), starts, lengths, config.settings(), None),
        *(config.block_size, all_partial, zero_tails),
    )


CALLS = {
    "plain": select_arguments(513, 513),
    "padded": select_arguments(513, 513, padded=True),
    "chunk, paper, bf16": select_arguments(130, 513, variant="paper", dtype=torch.bfloat16),
    "one query": select_arguments(1, 300),
    "block 128, tau 1, all partial": select_arguments(400, 400, block_size=128, tau=1.0, all_partial=True),
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=list(CALLS))
def test_opcheck_select(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(SELECT, arguments)


@pytest.mark.parametrize("tilted", [False, True])
def test_opcheck_with_means(tilted: bool) -> None:
    query, key = structured_qk(2, 4, 2, 300, 300, 16)
    lists = select_blocks(query, key, FlexPrefillConfig(gamma=0.5, min_budget=64, block_size=64)).lists
    arguments = (query, key, torch.randn_like(key), *lists, int32(0, 77), int32(300, 200), None, 64, tilted)
    torch.library.opcheck(torch.ops.flexprefill_fa.with_means.default, arguments)


def test_opcheck_copied() -> None:
    indices = int32(*range(40)).view(2, 2, 10)[..., 4:]
    torch.library.opcheck(torch.ops.flexprefill_fa.copied.default, (indices,))
    copy = torch.ops.flexprefill_fa.copied.default(indices)
    assert torch.equal(copy, indices) and copy.stride() == indices.stride()


@pytest.mark.parametrize("padding", [(None, None), (int32(3, 0), int32(40, 60)), (int32(3, 64), None)])
def test_opcheck_positions(padding: tuple[Tensor | None, Tensor | None]) -> None:
    query, key = torch.randn(2, 4, 10, 16), torch.randn(2, 2, 65, 16)
    torch.library.opcheck(POSITIONS, (query, key, *padding))


@pytest.mark.parametrize("batch", [1, 3])
def test_opcheck_sequence_ids(batch: int) -> None:
    torch.library.opcheck(SEQUENCE_IDS, (torch.tensor([[0, 1, 2, 0, 1, 0]]), torch.zeros(batch, 1, 4, 16)))


@pytest.mark.parametrize("arguments", CALLS.values(), ids=list(CALLS))
def test_fake_kernel_agrees(arguments: tuple[Any, ...]) -> None:
    real = SELECT(*arguments)
    with FakeTensorMode() as mode:
        fake = SELECT(*(mode.from_tensor(item) if isinstance(item, Tensor) else item for item in arguments))
    for expected, traced in zip(real, fake, strict=True):
        assert (traced.shape, traced.dtype, traced.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_fake_kernel_takes_symbolic_lengths() -> None:
    """So that one graph serves every prompt."""
    query, key, *rest = CALLS["plain"]
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 4)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = [mode.from_tensor(item, symbolic_context=dynamic) for item in (query, key)]
        lists = SELECT(*fake, *(mode.from_tensor(item) if isinstance(item, Tensor) else item for item in rest))
    assert [isinstance(size, torch.SymInt) for size in lists[2].shape] == [True] * 4


def test_sequence_ids() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 7]])
    ids, queries, keys = SEQUENCE_IDS(position_ids, torch.zeros(2, 1, 5, 16))
    assert ids.tolist() == [1, 1, 1, 2, 2, 3, 3, 3] * 2
    assert queries.tolist() == [3, 11, 19] and keys.tolist() == [0, 8, 16]


def test_positions_clamp_what_only_the_device_knows() -> None:
    """On a GPU nothing is checked against the lengths, so nonsense must stay inside the keys."""
    query, key = torch.randn(3, 1, 10, 16), torch.randn(3, 1, 50, 16)
    out = POSITIONS(query, key, int32(-5, 20, 70), int32(20, 99, 1))
    assert torch.stack(out)[:, :3].T.tolist() == [[40, 0, 20], [40, 20, 50], [40, 50, 50]]


def test_all_partial_and_zero_tails() -> None:
    *_, all_partial, zero_tails = CALLS["block 128, tau 1, all partial"]
    assert all_partial and zero_tails
    count, full_count, indices, _ = SELECT(*CALLS["block 128, tau 1, all partial"])
    assert (full_count == 0).all() and indices.shape == (*count.shape, 4 + 4)
    assert (indices[torch.arange(8) >= count[..., None]] == 0).all()
    count, full_count, indices, _ = SELECT(*CALLS["padded"])
    column = torch.arange(indices.shape[-1])
    listed = (column < count[..., None]) | (column >= 4) & (column < 4 + full_count[..., None])
    assert (indices[~listed] == 0).all() and full_count.any() and not listed.all()


def test_select_blocks_is_the_operator() -> None:
    query, key, starts, lengths, *_ = CALLS["padded"]
    config = FlexPrefillConfig(gamma=0.8, min_budget=1, block_size=64)
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths)
    assert torch.equal(selection.kv_num_blocks, SELECT(*CALLS["padded"])[0])
    assert torch.equal(selection.js_distance, SELECT(*CALLS["padded"])[3])
