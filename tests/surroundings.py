"""Sparse calls of each kind, checked against oracles over their own blocks, for tests of what surrounds a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle_attention import masked_attention
from test_attention import every_third_key, recency
from torch import Tensor
from workloads import structured_qk

from flexprefill_fa import BlockSelection, FlexPrefillConfig, sparse_prefill_attention

CONFIG = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)
Attend = Callable[..., Any]


def check_call(attend: Attend = sparse_prefill_attention, seed: int = 0, **arguments: Any) -> None:
    """One call of 900 queries and keys is exact attention over the blocks that it says, and is not dense attention."""
    query, key = structured_qk(2, 4, 2, 900, 900, 32, seed=seed)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        out, selection = attend(query, key, value, CONFIG, return_selection=True, **arguments)
    check_output(out, selection, query, key, value)


def check_output(out: Tensor, selection: BlockSelection, query: Tensor, key: Tensor, value: Tensor) -> None:
    keep = selection.to_dense()
    assert selection.density().mean() < 0.8
    padding: dict[str, Any] = {
        name: None if found is None else found.tolist()
        for name, found in (("starts", selection.starts), ("lengths", selection.lengths))
    }
    exact = masked_attention(query, key, value, keep, 128, **padding)
    dense = masked_attention(query, key, value, torch.ones_like(keep), 128, **padding)
    real = exact.abs().sum(-1) > 0  # rows that see nothing are zero
    torch.testing.assert_close(out.double()[real], exact[real], atol=1e-5, rtol=1e-5)
    assert (dense - exact)[real].abs().max() > 0.05, "dense attention would pass too"


def check_calls(attend: Attend = sparse_prefill_attention) -> None:
    """Whole and padded prompts, a prefix, and what a caller may add."""
    check_call(attend)
    check_call(attend, starts=[0, 130], lengths=[900, 700])
    query, key = structured_qk(1, 4, 2, 300, 900, 32)
    value = torch.randn(key.shape)
    with torch.no_grad():
        out, selection = attend(query, key, value, CONFIG, return_selection=True)
        check_output(out, selection, query, key, value)
        for name, mod in (("mask_mod", every_third_key), ("score_mod", recency)):
            # The same blocks, one mod more: what the compiled kernel makes of it is tested beside the kernel.
            out, selection = attend(query, key, value, CONFIG, return_selection=True, **{name: mod})
            expected = by_definition(query, key, value, selection.to_dense(), **{name: mod})
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def by_definition(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask_mod=None, score_mod=None) -> Tensor:
    keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ keys.mT * query.shape[-1] ** -0.5
    q, kv = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    head = torch.arange(query.shape[1])[:, None, None]
    seen = keep.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, : query.shape[2], : key.shape[2]]
    seen = seen & (kv <= q + key.shape[2] - query.shape[2])
    if mask_mod is not None:
        seen = seen & mask_mod(0, head, q, kv)
    if score_mod is not None:
        scores = score_mod(scores, 0, head, q, kv)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ values


def check_model(forward: Callable[[Any], Callable[..., Any]] = lambda model: model) -> None:
    """The logits of a sparse model are those over the blocks that its selector keeps, and not the dense ones."""
    from hf_models import oracle_layers, prompt, tiny_model  # of transformers, which the other checks do without

    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    model, ids = tiny_model("llama", layers=1), prompt(1, 1100)
    with torch.no_grad():
        dense = model(ids).logits
        with oracle_layers(model, CONFIG):
            expected = model(ids).logits
        with enable_sparse_prefill(model, CONFIG, statistics="density") as handle:
            found = forward(model)(ids, use_cache=False).logits
            assert all(layer.density.mean() < 0.8 for layer in handle.statistics.values())
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (dense - expected).abs().max() > 0.1, "dense attention would pass too"
