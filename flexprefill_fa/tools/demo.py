"""The demo: a trained model finds a number in a long prompt, once with dense and once with sparse prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from flexprefill_fa.masks import Selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.loading import UsageError, load_model
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, build_prompt, is_correct
from flexprefill_fa.tools.progress import WorkProgress


@dataclass(frozen=True)
class Answer:
    """One generated text, whether it is the hidden number exactly, and its `generation.Measurement`."""

    text: str
    correct: bool
    measurement: Any


@dataclass(frozen=True)
class DemoResult:
    """The key that was asked for, the number hidden under it, the two answers, and how they were computed."""

    key: str
    expected: str
    dtype: torch.dtype
    dense: Answer
    sparse: Answer
    mean_correction: MeanCorrection


def run_demo(
    config: Selector,
    *,
    tokens: int,
    needles: int,
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: WorkProgress,
    repeats: int = 1,
    mean_correction: MeanCorrection | Literal["auto"] = False,
) -> DemoResult:
    """Hide `needles` numbers in `tokens` tokens of Python source and ask the needle model for one, twice.

    Args:
        config: a selector's config, for the sparse answer.
        tokens, needles, seed: the prompt, see `needle.prompts.build_prompt`.
        dtype: of the model; None means float32 on the CPU and bfloat16 on a GPU.
        device: where the model runs.
        progress: shows the work.
        repeats: number of timed prefills for each answer.
        mean_correction: as for `enable_sparse_prefill`; "auto": what goes with the default selector.

    Raises:
        UsageError: without transformers, or when the needles do not fit.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with progress.task("loading the needle model"):
        model, tokenizer = load_model(MODEL_DIR, dtype, device)
    from tokenizers import Tokenizer

    from flexprefill_fa.tools.generation import measure_dense, measure_sparse, usual_correction

    try:
        prompt = build_prompt(
            Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")), tokens, needles=needles, seed=seed
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    input_ids = torch.tensor([prompt.token_ids], device=device)
    new_tokens = ANSWER_DIGITS
    if mean_correction == "auto":
        mean_correction = usual_correction(model)
    measurements = (
        measure_dense(model, input_ids, new_tokens, progress, repeats=repeats),
        measure_sparse(
            model,
            input_ids,
            config,
            new_tokens,
            progress,
            mean_correction=mean_correction,
            repeats=repeats,
            recall=True,
        ),
    )
    texts = [str(tokenizer.decode(measurement.token_ids)) for measurement in measurements]
    dense, sparse = (
        Answer(text, is_correct(text, prompt.answer), measurement)
        for text, measurement in zip(texts, measurements, strict=True)
    )
    return DemoResult(prompt.key, prompt.answer, dtype, dense, sparse, mean_correction)
