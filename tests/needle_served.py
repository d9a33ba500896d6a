"""Needle prompts for real serving engines, and what is asked of their answers."""

from __future__ import annotations

from typing import Any

from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, NeedlePrompt, build_prompt, is_correct

SELECTOR = {"gamma": 0.95, "min_budget": 512}
SETTINGS = {**SELECTOR, "min_prefill_tokens": 2048, "min_prompt_tokens": 8192}
BLIND = {"selector": "streaming_llm", "sink": 0, "window": 128, "min_prefill_tokens": 2048, "min_prompt_tokens": 8192}


def hidden_prompt(tokenizer: Any, tokens: int) -> NeedlePrompt:
    """A prompt whose asked number stands neither at its start nor within the last 2048 tokens."""
    for seed in range(1000, 1200):
        prompt = build_prompt(tokenizer, tokens, seed=seed)
        if 256 <= prompt.positions[list(prompt.needles).index(prompt.key)] < tokens - 2048:
            return prompt
    raise AssertionError(f"no such prompt of {tokens} tokens")


def phases(prompts: dict[str, list[NeedlePrompt]], *names: str) -> list[dict[str, Any]]:
    return [
        {
            "prompts": [prompt.token_ids for prompt in prompts[name]],
            "max_tokens": ANSWER_DIGITS,
            "together": name == "together",
            "fault": name == "faulty",
        }
        for name in names
    ]


def right(tokenizer: Any, prompts: list[NeedlePrompt], phase: dict[str, Any]) -> list[bool]:
    texts = [tokenizer.decode(ids) for ids in phase["outputs"]]
    return [is_correct(text, prompt.answer) for text, prompt in zip(texts, prompts, strict=True)]


def layers(phase: dict[str, Any]) -> list[dict[str, Any]]:
    """Statistics of every layer of every worker."""
    return [layer for worker in phase["statistics"] for layer in worker.values()]
