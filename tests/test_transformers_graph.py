"""`enable_sparse_prefill(model, graph="auto")`, with a stand-in for the graph that runs the call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from graph_stand_in import Graph, stand_in
from hf_models import SMALL, SPARSE, run, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import collect_statistics, enable_sparse_prefill


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The graphs that were made, in order."""
    with torch.no_grad():
        yield stand_in(monkeypatch)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def logits(model: PreTrainedModel, tokens: int = 400, **arguments: Tensor) -> Tensor:
    return run(model, tokens, **arguments).logits


def test_layers_that_are_alike_share_a_graph(llama: PreTrainedModel, made: list[Graph]) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        expected = logits(llama)
    with enable_sparse_prefill(llama, SPARSE, graph="auto"):
        outs = [logits(llama) for _ in range(3)]  # of two layers each; the second layer is the second of its kind
        assert len(made) == 1 and made[0].replays == 5
        for out in outs:
            torch.testing.assert_close(out, expected)
        assert made[0].config == SPARSE and made[0].arguments["dense"] == "never"


def test_what_is_asked_of_a_graph_is_asked_of_each_kind(llama: PreTrainedModel, made: list[Graph]) -> None:
    """Another selector is another graph, whose blocks are others; padding comes with each replay."""
    everything = FlexPrefillConfig(gamma=1.0, min_budget=1024)
    padded = torch.ones(1, 400).long()
    padded[0, :150] = 0
    for config in (SPARSE, everything):
        with enable_sparse_prefill(llama, config, min_prompt_tokens=1):
            expected, with_padding = logits(llama), logits(llama, attention_mask=padded)
        with enable_sparse_prefill(llama, config, min_prompt_tokens=1, graph="auto"):
            for _ in range(2):
                torch.testing.assert_close(logits(llama), expected)
                torch.testing.assert_close(logits(llama, attention_mask=padded)[:, 150:], with_padding[:, 150:])
    assert [graph.config for graph in made] == [SPARSE, SPARSE, everything, everything]


def test_prefills_without_a_graph(llama: PreTrainedModel, made: list[Graph]) -> None:
    with enable_sparse_prefill(llama, SPARSE):
        [logits(llama) for _ in range(2)]
    with enable_sparse_prefill(llama, SPARSE, min_prompt_tokens=401, graph="auto"):
        [logits(llama) for _ in range(2)]
    with enable_sparse_prefill(llama, SPARSE, graph="auto"), collect_statistics(llama) as found:
        [logits(llama) for _ in range(2)]
        assert (found.latest().density < 1).any()
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)).eval()
    with enable_sparse_prefill(capped, SPARSE, graph="auto"):
        [logits(capped) for _ in range(2)]
    assert not made


def test_a_wrong_word(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"graph must be one of \('never', 'auto'\), got 'always'"):
        enable_sparse_prefill(llama, SPARSE, graph="always")  # pyright: ignore[reportArgumentType]
