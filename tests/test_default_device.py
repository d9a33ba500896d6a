"""A default device of the process or a context is no device of ours: what belongs on the host stays there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hf_models import prompt, tiny_model
from surroundings import CONFIG
from workloads import structured_qk

from flexprefill_fa import (
    FlashPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    create_flexprefill_block_mask,
    select_blocks,
    sparse_prefill_attention,
)
from flexprefill_fa.integrations.transformers import collect_statistics, enable_sparse_prefill


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("place", [default_device, torch.device], ids=["default", "context"])
def test_a_model(place: Callable[[str], AbstractContextManager]) -> None:
    model, ids = tiny_model("llama"), prompt(2, 1100)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    with torch.no_grad(), enable_sparse_prefill(model, CONFIG):
        expected, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    with place("meta"), enable_sparse_prefill(model, CONFIG):
        pass  # restored
    with place("meta"):
        handle = enable_sparse_prefill(model, CONFIG)
    with torch.no_grad(), collect_statistics(model) as found:
        torch.testing.assert_close(model(ids).logits, expected)
        with place("meta"):
            torch.testing.assert_close(model(ids).logits, expected)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, padded)
            assert found.latest().density.mean() < 0.8
            handle.disable()


@pytest.mark.parametrize("place", [default_device, torch.device], ids=["default", "context"])
def test_a_call(place: Callable[[str], AbstractContextManager]) -> None:
    query, key = structured_qk(2, 4, 2, 900, 900, 32)
    configs = (CONFIG, FlashPrefillConfig(), StreamingLLMConfig(128, 256), VerticalSlashConfig(256, 256))
    expected = [select_blocks(query, key, config, lengths=[900, 800]).to_dense() for config in configs]
    value = torch.randn(key.shape)
    options: dict[str, Any] = {"lengths": [900, 800]}
    with torch.no_grad():
        out = sparse_prefill_attention(query, key, value, CONFIG, **options)
        mask = create_flexprefill_block_mask(query, key, config=CONFIG, **options)
    with torch.no_grad(), place("meta"):
        found = [select_blocks(query, key, config, lengths=[900, 800]).to_dense() for config in configs]
        assert torch.equal(sparse_prefill_attention(query, key, value, CONFIG, **options), out)
        same = create_flexprefill_block_mask(query, key, config=CONFIG, **options)
        assert torch.equal(same.kv_num_blocks, mask.kv_num_blocks)
        assert select_blocks(query, key, CONFIG).recall(query, key).device.type == "cpu"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
