"""Lists as wide as the fullest row needs: the same blocks, for every selector, and the same attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_selector import define_documented, example, names
from oracle import causal_oracle, relative_error
from torch import Tensor
from workloads import blocky_qk, structured_qk

from flexprefill_fa import (
    BlockSelection,
    Selector,
    block_sparse_attention,
    create_block_mask,
    list_width,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.list_width import full_width_bytes, select_narrow, too_wide

PLACES: list[dict[str, Any]] = [{}, {"starts": [0, 70], "lengths": [900, 513]}]


@pytest.fixture(scope="module", autouse=True)
def documented_selector(tmp_path_factory: pytest.TempPathFactory) -> None:
    define_documented(tmp_path_factory.mktemp("documented"))


def narrow_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("masks.block_masks", "dispatch"):
        monkeypatch.setattr(f"flexprefill_fa.{module}.too_wide", lambda *_: True)


def same_blocks(narrow: BlockSelection, wide: BlockSelection) -> None:
    assert torch.equal(narrow.to_dense(), wide.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(narrow, name), getattr(wide, name))
    assert narrow.diagnostics.keys() == wide.diagnostics.keys()
    for name, values in wide.diagnostics.items():
        torch.testing.assert_close(narrow.diagnostics[name], values, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("place", PLACES, ids=["whole", "padded"])
@pytest.mark.parametrize("piece_bytes", [1, 2**30], ids=["head by head", "at once"])
def test_every_selector_keeps_the_same(
    name: str, place: dict[str, Any], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = blocky_qk(2, 6, 3, 700, 900, 16)
    wide = select_blocks(query, key, example(name), **place)
    assert wide.kv_indices.shape[-1] == 15
    narrow_on_the_cpu(monkeypatch)
    monkeypatch.setattr(list_width, "PIECE_BYTES", piece_bytes)
    narrow = select_blocks(query, key, example(name), **place)
    same_blocks(narrow, wide)
    fullest = int(torch.maximum(wide.kv_num_blocks, wide.full_kv_num_blocks).max())
    for indices in (narrow.kv_indices, narrow.full_kv_indices):
        assert indices.shape[-1] == fullest < 15 and indices.is_contiguous()


def test_heads_come_in_pieces_where_the_rule_sees_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels, or no look at queries at all; a rule in plain PyTorch gets all heads."""
    query, key = blocky_qk(1, 8, 4, 400, 400, 16)
    half = full_width_bytes(query, key, 64) // 2
    monkeypatch.setattr(list_width, "PIECE_BYTES", half)
    for name, pieces in (("flashprefill", [4, 4]), ("streaming_llm", [4, 4]), ("pooled_top", [8])):
        config, seen = example(name), []
        real = config.operator()

        def operator(q: Tensor, *rest: Any, seen: list = seen, real: Any = real) -> Any:
            seen.append(q.shape[1])
            return real(q, *rest)

        monkeypatch.setattr(type(config), "operator", lambda operator=operator: operator)
        select_narrow(query, key, None, None, config, config.settings(), None, False)
        assert seen == pieces, name


def test_rows_that_keep_nothing_have_a_column() -> None:
    """Queries that are padding alone."""
    query, key = blocky_qk(1, 2, 1, 64, 400, 16)
    config: Any = example("flashprefill")
    lengths = torch.tensor([100])
    found = select_narrow(query, key, None, lengths, config, config.settings(), None, False)
    assert found[1].shape == found[3].shape == (1, 2, 1, 1) and found[0].sum() == found[2].sum() == 0


@pytest.mark.parametrize("mean_correction", [False, True])
def test_attention_is_the_same(mean_correction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing compiles: the CPU's kernel takes full lists alone."""
    query, key = structured_qk(2, 4, 2, 500, 700, 32)
    value = torch.randn_like(key)
    config: Any = example("flashprefill")
    arguments: dict[str, Any] = {"mean_correction": mean_correction, "dense": "never", "return_selection": True}
    with torch.compiler.set_stance("force_eager"):
        expected, wide = sparse_prefill_attention(query, key, value, config, **arguments)
        narrow_on_the_cpu(monkeypatch)
        out, narrow = sparse_prefill_attention(query, key, value, config, **arguments)
    assert narrow.kv_indices.shape[-1] < wide.kv_indices.shape[-1] and wide.density().max() < 1
    same_blocks(narrow, wide)
    assert torch.equal(out, expected)


def test_a_block_mask_has_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own methods of it take the width for the number of blocks."""
    query, key = blocky_qk(1, 4, 2, 600, 600, 16)
    config: Any = example("flashprefill")
    expected = create_block_mask(query, key, config).to_dense()
    narrow_on_the_cpu(monkeypatch)
    assert torch.equal(create_block_mask(query, key, config).to_dense(), expected)
    assert select_blocks(query, key, config).kv_indices.shape[-1] < 10


class FakeQuery:
    """A tensor's shape on a GPU that is not there."""

    is_cuda = True

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def test_from_which_length_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 heads: 256K tokens wait for nothing, 512K do; but not while a graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def wide(tokens: int, queries: int | None = None) -> bool:
        query: Any = FakeQuery(1, 32, tokens if queries is None else queries, 128)
        key: Any = FakeQuery(1, 8, tokens, 128)
        return too_wide(query, key, 128)

    assert [wide(n) for n in (131_072, 262_144, 524_288, 1_048_576)] == [False, False, True, True]
    assert not wide(1_048_576, queries=8192)  # a chunk's lists are small
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not wide(1_048_576)
    query, key = torch.empty(1, 32, 2**20, 1, device="meta"), torch.empty(1, 8, 2**20, 1, device="meta")
    assert not too_wide(query, key, 128)  # the CPU's kernel takes lists of full width alone


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["TRITON", "FLASH"])
@pytest.mark.parametrize("name", names())
def test_on_the_gpu(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexprefill_fa.backends import flash_problem

    query, key = (x.to("cuda", torch.bfloat16) for x in structured_qk(1, 8, 2, 4000, 4000, 128))
    value = torch.randn_like(key)
    if backend == "FLASH" and (problem := flash_problem(query, 128)):
        pytest.skip(problem)
    config: Selector = example(name, block_size=128)
    arguments: dict[str, Any] = {"backend": backend, "dense": "never", "return_selection": True}
    expected, wide = sparse_prefill_attention(query, key, value, config, **arguments)
    monkeypatch.setattr(list_width, "WIDE_BYTES", 0)
    monkeypatch.setattr(list_width, "PIECE_BYTES", 1)
    out, narrow = sparse_prefill_attention(query, key, value, config, **arguments)
    same_blocks(narrow, wide)
    assert narrow.kv_indices.shape[-1] < 32 or wide.density().max() == 1
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    exact, _, real = causal_oracle(query, key, value, narrow)
    assert relative_error(out, exact, real) < 1e-2
    torch.testing.assert_close(block_sparse_attention(query, key, value, narrow, backend=backend), out, atol=0, rtol=0)
