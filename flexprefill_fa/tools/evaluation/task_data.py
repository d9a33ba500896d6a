"""Recipes as data of lm-evaluation-harness tasks: what the `!function` entries of the task files call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flexprefill_fa.tools.evaluation.budget import CountTokens, Recipe, Sample, fit
from flexprefill_fa.tools.evaluation.ruler import score


def dataset(
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    pretrained: str | None = None,
    max_seq_lengths: Sequence[int] = (4096,),
    samples: int = 500,
    seed: int = 0,
    chat_template: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """The `custom_dataset` of a task: its split "test".

    Args:
        recipe: the task.
        tokenizer: that of the model, or the path or name of one; `pretrained` serves where it is missing.
        max_seq_lengths: budgets in tokens, prompt and answer together.
        samples: questions per length.
        seed: of the questions.
        chat_template: whether prompts will be put into the tokenizer's chat template, whose tokens count too.

    Raises:
        ValueError: without a tokenizer.
        BudgetError: where a length is too short for the task.
    """
    import datasets

    source = tokenizer if tokenizer is not None else pretrained
    if source is None:
        raise ValueError("prompts are measured in tokens: expected metadata with tokenizer or pretrained, got neither")
    if isinstance(source, str):
        from transformers import AutoTokenizer

        source = AutoTokenizer.from_pretrained(source)
    count = token_counter(source, chat_template)
    rows = [
        {
            "index": index,
            "input": sample.prompt,
            "gen_prefix": sample.prefix,
            "outputs": list(sample.outputs),
            "max_length": length,
            "prompt_tokens": tokens,
        }
        for length in max_seq_lengths
        for index, (sample, tokens) in enumerate(fit(recipe, count, length, samples, seed))
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def data_of(recipe: Recipe) -> Callable[..., dict[str, Any]]:
    """What a task file's `custom_dataset` may name: `dataset` for one recipe."""

    def build(**metadata: Any) -> dict[str, Any]:
        return dataset(recipe, **metadata)

    build.__module__ = __name__
    return build


def token_counter(tokenizer: Any, chat_template: bool) -> CountTokens:
    """Counts tokens as the harness will encode prompts: special tokens included, each once."""

    def count(samples: list[Sample]) -> list[int]:
        if not chat_template:
            return [len(ids) for ids in tokenizer([sample.text for sample in samples])["input_ids"]]
        texts = [_chat(tokenizer, sample) for sample in samples]
        bos = getattr(tokenizer, "bos_token", None)
        options = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        return [len(ids) for ids in tokenizer(texts, **options)["input_ids"]]

    return count


def _chat(tokenizer: Any, sample: Sample) -> str:
    turns = [{"role": "user", "content": sample.prompt}]
    if not sample.prefix:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": sample.prefix})
    return tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's score of one answer."""
    return {"string_match": score(results[0], doc["outputs"])}


def takes_budget(function: Any) -> bool:
    """Whether a task's `custom_dataset` makes its prompts to a length: ours do, and lm-eval's own RULER tasks."""
    return getattr(function, "__module__", "").startswith((__name__, "lm_eval.tasks.ruler."))
