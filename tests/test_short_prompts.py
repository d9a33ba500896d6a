"""Prompts that keep every block run as dense SDPA, without a graph, and mean the same."""

from __future__ import annotations

import logging

import pytest
import torch
from compiled import graphs
from oracle_attention import attention_probabilities, masked_attention
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, sparse_prefill_attention

CONFIG = FlexPrefillConfig(gamma=0.2, tau=0.0, min_budget=500)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "starts", "lengths"),
    [
        (512, 512, None, None),
        (1, 512, None, None),
        (1, 2000, None, None),
        (1, 2000, [0, 1900], None),
        (100, 300, None, None),
        (127, 511, [0, 300], [511, 211]),
        (400, 400, [17, 0], [383, 100]),
        (400, 400, None, [400, 1]),
        (50, 400, None, [100, 400]),
        (1, 1, None, None),
    ],
)
def test_dense_path(q_len: int, kv_len: int, starts: list[int] | None, lengths: list[int] | None) -> None:
    query, key = structured_qk(2, 4, 2, q_len, kv_len, 32)
    value = torch.randn(key.shape)
    before = graphs()
    with torch.no_grad():
        out, selection = sparse_prefill_attention(
            query, key, value, CONFIG, starts=starts, lengths=lengths, return_selection=True
        )
    assert graphs() == before
    assert out.isfinite().all(), "rows of padding too"
    real = attention_probabilities(query, key, None, starts, lengths).sum(-1) > 0
    keep = torch.ones_like(selection.to_dense())
    exact = masked_attention(query, key, value, keep, 128, starts=starts, lengths=lengths)
    torch.testing.assert_close(out.double()[real], exact[real], atol=1e-5, rtol=1e-5)
    some = real.any(-1)
    assert (selection.density()[some] == 1).all()


def test_one_token_more_runs_sparse(caplog: pytest.LogCaptureFixture) -> None:
    query, key = structured_qk(1, 4, 2, 513, 513, 64)
    value = torch.randn(key.shape)
    before = graphs()
    config = FlexPrefillConfig(gamma=0.2, tau=0.0, min_budget=500, max_budget=500)
    with torch.no_grad():
        out, selection = sparse_prefill_attention(query, key, value, config, return_selection=True)
        with caplog.at_level(logging.DEBUG, "flexprefill_fa"):
            again = sparse_prefill_attention(query, key, value, config)
            sparse_prefill_attention(query[:, :, :512], key[:, :, :512], value[:, :, :512], config)
    assert graphs() <= before + 1
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("flexprefill_fa")]
    assert messages == ["sparse attention by CPU: 513 queries, 513 keys", "dense attention: 512 queries, 512 keys"]
    assert torch.equal(out, again)
    exact = masked_attention(query, key, value, selection.to_dense(), 128)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert (selection.js_distance > 0).all(), "the selector ran"


def test_an_explicit_backend_runs_its_kernel_at_any_length() -> None:
    query, key = structured_qk(1, 4, 2, 200, 200, 64)
    value = torch.randn(key.shape)
    with torch.no_grad():
        forced = sparse_prefill_attention(query, key, value, CONFIG, backend="CPU")
        dense = sparse_prefill_attention(query, key, value, CONFIG)
    torch.testing.assert_close(forced, dense, atol=1e-5, rtol=1e-5)
