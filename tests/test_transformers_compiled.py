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
from flexprefill_fa.integrations.transformers import SparsePrefill, compile_prefill, enable_sparse_prefill

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


@torch.no_grad()
def test_uncompiled_calls_between_compiled_ones_cost_no_graph(model: PreTrainedModel) -> None:
    with enable_sparse_prefill(model, SPARSE):
        compiled, counts = torch.compile(model, fullgraph=True, dynamic=True), []
        for length in (650, 901, 1100):
            expected = model(prompt(1, length), use_cache=False).logits
            before = graphs()
            torch.testing.assert_close(
                compiled(prompt(1, length), use_cache=False).logits, expected, atol=1e-4, rtol=1e-4
            )
            counts.append(graphs() - before)
    assert counts == [1, 0, 0]


def test_generate_with_a_compiled_prefill(model: PreTrainedModel) -> None:
    """Five lengths: one graph below min_prompt_tokens, one above, tokens as uncompiled, and the model given back."""

    def generate(length: int) -> list[int]:
        out = model.generate(prompt(1, length), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        return out[0].tolist()

    lengths = (300, 400, 650, 901, 1100)
    with enable_sparse_prefill(model, SPARSE, min_prompt_tokens=500, statistics="density") as sparse:
        expected = [generate(length) for length in lengths]
        assert all(layer.density.mean() < 0.9 for layer in sparse.statistics.values())
        with compile_prefill(model):
            found, counts = [], []
            for length in lengths:
                found.append(generate(length))
                counts.append(graphs())
                if length > 500:
                    assert (kept_blocks(sparse) < causal_blocks(length, 0)).all(), "dense"
    assert found == expected
    assert counts[1] == counts[0] and counts[2:] == [counts[0] + 1] * 3
    assert "forward" not in vars(model)


def test_masks_that_the_compiler_does_not_see(model: PreTrainedModel) -> None:
    gaps = torch.ones(1, 400).long()
    gaps[0, 100:110] = 0
    square = torch.ones(1, 1, 400, 400, dtype=torch.bool)  # not causal
    with torch.no_grad():
        expected = model(prompt(1, 400), attention_mask=square).logits
        with enable_sparse_prefill(model, SPARSE), compile_prefill(model):
            with pytest.raises(ValueError, match="to be one run, got a row with gaps"):
                model(prompt(1, 400), attention_mask=gaps)
            torch.testing.assert_close(
                model(prompt(1, 400), attention_mask=square).logits, expected, atol=1e-5, rtol=1e-5
            )


def test_the_forward_that_was_there_comes_back(model: PreTrainedModel) -> None:
    own = model.forward

    def hooked(*arguments: Any, **named: Any) -> Any:
        return own(*arguments, **named)

    model.forward = hooked  # as libraries do that spread a model over devices
    try:
        with enable_sparse_prefill(model, SPARSE):
            first = compile_prefill(model)
            first.disable()
            assert vars(model)["forward"] is hooked
            with compile_prefill(model):
                installed = vars(model)["forward"]
                first.disable()
                assert vars(model)["forward"] is installed
            assert vars(model)["forward"] is hooked
    finally:
        del model.forward


def test_what_cannot_be_compiled(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="call enable_sparse_prefill first; the model's attention is 'sdpa'"):
        compile_prefill(model)
    twice = pytest.raises(ValueError, match="the prefill of this LlamaForCausalLM is compiled already")
    with enable_sparse_prefill(model, SPARSE), compile_prefill(model), twice:
        compile_prefill(model)
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got str"):
        compile_prefill("llama")  # type: ignore[arg-type]


def kept_blocks(sparse: SparsePrefill) -> Tensor:
    (layer,) = sparse.statistics.values()
    kept = layer.kept_blocks.clone()
    layer.kept_blocks.fill_(-1)  # the next run has to write its own
    return kept
