"""Dense causal attention by name, attention over a given selection, and what a CUDA graph refuses."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import causal_oracle, relative_error
from workloads import structured_qk

from flexprefill_fa import (
    FlexPrefillConfig,
    PrefillGraph,
    block_sparse_attention,
    flash,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.dense import causal_attention, fastest_dense
from flexprefill_fa.selection import every_block

CONFIG = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=64, block_size=64)


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key = structured_qk(1, 4, 2, n, n, 32, seed=n)
    return query, key, torch.randn_like(key)


@pytest.mark.parametrize("n", [1, 127, 300, 384])
def test_flex_attention_over_every_block_is_dense_attention(n: int) -> None:
    query, key, value = inputs(n)
    expected = causal_attention(query.double().float(), key, value)
    torch.testing.assert_close(causal_attention(query, key, value, "CPU"), expected, atol=2e-6, rtol=1e-5)


def test_kernels_that_cannot_run_say_why() -> None:
    query, key, value = inputs(100)
    with pytest.raises(ValueError, match=r"kernel must be one of .*got 'fast'"):
        causal_attention(query, key, value, "fast")
    with pytest.raises(ValueError, match=r"sdpa_cudnn.*needs a CUDA GPU"):
        causal_attention(query, key, value, "sdpa_cudnn")
    with pytest.raises(ValueError, match=r"FLASH.*needs a CUDA GPU"):
        causal_attention(query, key, value, "FLASH")
    with pytest.raises(ValueError, match=r"flash_attn_4.*needs a CUDA GPU"):
        causal_attention(query, key, value, "flash_attn_4")
    with pytest.raises(ValueError, match="as many queries as keys, got 60 and 100"):
        causal_attention(query[:, :, :60], key, value)
    assert fastest_dense(query) == "sdpa"


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("layout", ["rows", "heads", "odd strides", "odd start"])
def test_flash_attn_4_is_given_rows_that_it_can_read(
    layout: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for its function, which is called as its version 4.0.0b10 is and copies nothing by itself."""
    given: list[torch.Tensor] = []

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: Any, causal: bool) -> Any:
        given.extend((q, k, v))
        for x in given:
            assert x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:-1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return (out.transpose(1, 2), None) if with_lse else out.transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
    flash._flash_attn_func.cache_clear()

    def lay(x: torch.Tensor) -> torch.Tensor:
        wide = {"odd strides": 33, "odd start": 40}.get(layout, 32)
        memory = torch.zeros(*x.shape[:2], x.shape[2], wide, dtype=torch.bfloat16)
        if layout == "rows":
            memory = memory.transpose(1, 2).contiguous().transpose(1, 2)
        view = memory[..., 1:33] if layout == "odd start" else memory[..., :32]
        return view.copy_(x)

    query, key, value = tensors = [lay(x) for x in inputs(300)]
    found = flash.flash_causal(query, key, value, 0.3)
    flash._flash_attn_func.cache_clear()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.equal(found, expected)
    copied = [x.data_ptr() != y.data_ptr() for x, y in zip(tensors, given, strict=True)]
    assert copied == [layout.startswith("odd")] * 3


def test_attention_over_a_selection_follows_the_selection() -> None:
    query, key, value = inputs(700)
    selection = select_blocks(query, key, CONFIG)
    out = block_sparse_attention(query, key, value, selection)
    expected, _, real = causal_oracle(query, key, value, selection)
    assert relative_error(out, expected, real) < 1e-5
    fewer = selection.full_kv_num_blocks.clone()
    fewer[:, :, -1] -= 1  # the last full block of the last row
    dropped = dataclasses.replace(selection, full_kv_num_blocks=fewer)
    changed = block_sparse_attention(query, key, value, dropped)
    assert not torch.allclose(changed[:, :, -1], out[:, :, -1], atol=1e-4)
    torch.testing.assert_close(changed[:, :, :600], out[:, :, :600])


def test_a_selection_for_other_tensors_is_refused() -> None:
    query, key, value = inputs(300)
    selection = select_blocks(query, key, CONFIG)
    with pytest.raises(ValueError, match=r"selection is for .*\(300, 300, 1, 4\), got tensors of \(200, 300, 1, 4\)"):
        block_sparse_attention(query[:, :, :200], key, value, selection)


def test_a_mask_needs_every_block_in_the_partial_list() -> None:
    """FlexAttention evaluates no mask in full blocks: it would be dropped there."""
    query, key, value = inputs(500)

    def same_half(b, h, q_idx, kv_idx):
        return (q_idx < 200) == (kv_idx < 200)

    with pytest.raises(ValueError, match="all_partial=True"):
        block_sparse_attention(query, key, value, select_blocks(query, key, CONFIG), mask_mod=same_half)
    selection = select_blocks(query, key, CONFIG, all_partial=True)
    out = block_sparse_attention(query, key, value, selection, mask_mod=same_half)
    alone = block_sparse_attention(query, key, value, selection)
    assert torch.allclose(out[:, :, :200], alone[:, :, :200], atol=1e-5)
    assert not torch.allclose(out[:, :, 200:], alone[:, :, 200:], atol=1e-2)


def test_a_dense_call_returns_the_selection_it_amounts_to() -> None:
    query, key, value = inputs(100)
    out, selection = sparse_prefill_attention(query, key, value, CONFIG, return_selection=True)
    assert selection.density().eq(1).all()
    expected, _, real = causal_oracle(query, key, value, selection)
    assert relative_error(out, expected, real) < 1e-5


@pytest.mark.parametrize("padding", [None, ([0, 70], [300, 200])], ids=["whole", "padded"])
def test_every_block_is_what_dense_attention_computes(padding: tuple[list[int], list[int]] | None) -> None:
    query, key = structured_qk(2, 2, 1, 130, 300, 32)
    place = (None, None) if padding is None else tuple(torch.tensor(x) for x in padding)
    selection = every_block(query, key, 64, *place)
    everything = select_blocks(
        query, key, FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64), starts=place[0], lengths=place[1]
    )
    assert torch.equal(selection.to_dense(), everything.to_dense())
    assert torch.equal(selection.kv_num_blocks, everything.kv_num_blocks)
    assert selection.density().eq(1).all()


def test_a_prefill_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        PrefillGraph(*inputs(300), CONFIG)
