"""Prompts that keep every block run as dense SDPA, without a graph, and mean the same."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from compiled import graphs
from oracle_attention import attention_probabilities, masked_attention
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, StreamingLLMConfig, sparse_prefill_attention

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


def test_a_backend_names_a_kernel_and_dense_says_what_it_runs_over(caplog: pytest.LogCaptureFixture) -> None:
    query, key = structured_qk(1, 4, 2, 200, 200, 64)
    value = torch.randn(key.shape)
    asked: list[dict[str, Any]] = [{}, {"backend": "CPU"}, {"dense": "never"}, {"dense": "never", "backend": "CPU"}]
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "flexprefill_fa.dispatch"):
        outs = [sparse_prefill_attention(query, key, value, CONFIG, **options) for options in asked]
    found = [
        record.getMessage().partition(":")[0] for record in caplog.records if record.name.startswith("flexprefill_fa")
    ]
    sparse = "sparse attention by CPU"
    assert found == ["dense attention", "dense attention by CPU", sparse, sparse]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)


def test_dense_never_keeps_single_queries_sparse_too() -> None:
    """StreamingLLM leaves blocks out of a single query's row, and its window's edge shows in the output."""
    query, key = structured_qk(1, 2, 1, 1, 900, 32)
    value, config = torch.randn(key.shape), StreamingLLMConfig(0, 64, 64)
    with torch.no_grad():
        dense = sparse_prefill_attention(query, key, value, config)
        out, selection = sparse_prefill_attention(query, key, value, config, dense="never", return_selection=True)
    exact = masked_attention(query, key, value, selection.to_dense(), 64)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert selection.density().max() < 0.5 and (out - dense).abs().max() > 0.01


@pytest.mark.parametrize("dense", ["always", True, None])
def test_other_values_of_dense_are_refused(dense: Any) -> None:
    query, key = structured_qk(1, 2, 1, 300, 300, 32)
    with pytest.raises(ValueError, match=re.escape(f"dense must be one of ('auto', 'never'), got {dense!r}")):
        sparse_prefill_attention(query, key, key.clone(), CONFIG, dense=dense)
