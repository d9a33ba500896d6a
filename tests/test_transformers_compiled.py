"""A model compiled as a whole really runs sparse: kept blocks are counted inside the compiled run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import graphs
from hf_models import prompt, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import SparsePrefill, enable_sparse_prefill

SPARSE = FlexPrefillConfig(gamma=0.4, tau=0.0, min_budget=1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=1)


def run(model: Any, ids: Tensor, arguments: dict[str, Tensor], config: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=DynamicCache(config=config), **arguments).logits


def causal_blocks(length: int, start: int) -> int:
    first, last = start // 128, -(-length // 128)
    return sum(range(1, last - first + 1))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_one_graph_serves_two_lengths_and_is_sparse(model: PreTrainedModel, padded: bool) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with enable_sparse_prefill(model, SPARSE, statistics="density") as sparse:
        before = -1
        for length in (650, 901):
            ids = prompt(2, length)
            starts = (0, 130) if padded else (0, 0)
            mask = (torch.arange(length) >= torch.tensor(starts)[:, None]).long()
            arguments = {"attention_mask": mask} if padded else {}
            inside = run(compiled, ids, arguments, model.config)
            kept = kept_blocks(sparse)
            assert before in (-1, graphs()), "the second length shares the graph of the first"
            outside = run(model, ids, arguments, model.config)
            assert torch.equal(kept, kept_blocks(sparse))
            causal = torch.tensor([[causal_blocks(length, start)] for start in starts])
            assert (kept < causal).all(), "dense"
            torch.testing.assert_close(inside[mask.bool()], outside[mask.bool()], atol=1e-4, rtol=1e-4)
            before = graphs()
    dense = run(model, ids, arguments, model.config)
    assert (dense - inside)[mask.bool()].abs().max() > 0.01


def kept_blocks(sparse: SparsePrefill) -> Tensor:
    (layer,) = sparse.statistics.values()
    kept = layer.kept_blocks.clone()
    layer.kept_blocks.fill_(-1)  # the next run has to write its own
    return kept
