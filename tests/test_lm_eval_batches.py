"""Log-likelihoods through lm-eval do not depend on the batch: what pads a batch is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import prompt, tiny_model

from flexprefill_fa.tools.needle import MODEL_DIR

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'flexprefill-fa[eval]'")
from flexprefill_fa.integrations.lm_eval import FlexPrefillLM

SPARSE = "flexprefill:gamma=0.4+tau=0+min_budget=1"
LENGTHS = (900, 650, 777, 1000, 300)
Requests = list[tuple[Any, list[int], list[int]]]


@pytest.fixture(scope="module")
def requests() -> Requests:
    """Context and continuation of several lengths; the second ends as a padded one does."""
    tokens = [prompt(1, length, seed=length)[0].tolist() for length in LENGTHS]
    tokens[1][-4:-1] = [0, 0, 0]
    return [(None, row[:-3], row[-3:]) for row in tokens]


def answers(requests: Requests, batch: int, selector: str = SPARSE) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    lm = FlexPrefillLM(tiny_model("llama"), selector, tokenizer=tokenizer, batch_size=batch)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert selector == "dense" or lm.density() < 0.9, "ran dense"
    return torch.tensor([value for value, _ in found])


def test_a_batch_answers_as_each_request_alone(requests: Requests) -> None:
    alone = answers(requests, 1)
    torch.testing.assert_close(answers(requests, 3), alone, atol=1e-4, rtol=1e-4)
    dense = answers(requests, 3, "dense")
    torch.testing.assert_close(answers(requests, 1, "dense"), dense, atol=1e-4, rtol=1e-4)
    assert ((alone - dense).abs() > 0.01).any(), "the same as dense"


def test_the_last_request_may_be_the_only_one(requests: Requests) -> None:
    torch.testing.assert_close(answers(requests[1:2], 3), answers(requests, 3)[1:2], atol=1e-4, rtol=1e-4)
