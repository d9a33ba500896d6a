"""On a CUDA GPU: attention sinks, which the CPU does not serve, and capped scores, windows and odd head dims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from families import FAMILIES  # noqa: E402

from flexprefill_fa import FlexPrefillConfig  # noqa: E402
from flexprefill_fa.integrations.transformers import describe_sparse_prefill, enable_sparse_prefill  # noqa: E402

pytestmark = pytest.mark.gpu
EVERYTHING = FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64)
SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1, block_size=64)
LENGTH, PADDING = 300, 77


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def model(request: pytest.FixtureRequest) -> Any:
    tiny: Any = FAMILIES[request.param]()
    return tiny.to("cuda")


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> Tensor:
    ids = torch.randint(1, 120, (2, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    return model(ids, **arguments).logits


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("padded", [False, True])
def test_everything_kept_is_the_models_own_attention(model, padded: bool) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    if padded:
        mask[1, :PADDING] = 0
    expected = logits(model, attention_mask=mask)[mask.bool()]
    with enable_sparse_prefill(model, EVERYTHING, min_prompt_tokens=1):
        assert "dense" not in {layer.runs for layer in describe_sparse_prefill(model)}
        actual = logits(model, attention_mask=mask)[mask.bool()]
    assert error(actual, expected) < 5e-3  # tf32 products


def test_half_the_attention_is_not_all_of_it(model) -> None:
    if "sparse" not in {layer.runs for layer in describe_sparse_prefill(model)}:
        pytest.skip("all its layers attend to a window")
    expected = logits(model)
    with enable_sparse_prefill(model, SPARSE, min_prompt_tokens=1, statistics="density") as handle:
        actual = logits(model)
    assert actual.isfinite().all() and error(actual, expected) > 2e-2
    assert all(layer.density.mean() < 0.9 for layer in handle.statistics.values())
