"""The trained needle model answers a 4K-token prompt with a sparse prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.transformers import enable_sparse_prefill
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, build_prompt, is_correct

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


def test_sparse_answers_at_4k(needle_model: PreTrainedModel, needle_tokenizer: Tokenizer) -> None:
    config = FlexPrefillConfig(gamma=0.95, min_budget=512)
    prompt = build_prompt(needle_tokenizer, 4096, seed=0)
    ids = torch.tensor([prompt.token_ids])
    with enable_sparse_prefill(needle_model, config, statistics="density") as sparse:
        out = needle_model.generate(  # type: ignore[operator]
            ids, max_new_tokens=ANSWER_DIGITS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    answer = needle_tokenizer.decode(out.sequences[0, ids.shape[1] :].tolist())
    assert is_correct(answer, prompt.answer), f"{answer!r}, not {prompt.answer!r}"
    assert len(sparse.statistics) == needle_model.config.num_hidden_layers
    with torch.no_grad():
        dense = needle_model(ids, logits_to_keep=1).logits[:, -1]
    assert (out.logits[0] - dense).abs().max() > 1e-3, "the prefill was dense"
    density = torch.cat([layer.density for layer in sparse.statistics.values()]).mean()
    assert density < 0.4, f"density {density:.2f}"
