"""Settings of the vLLM backend: from the engine's `additional_config`, else from the environment. Imports no vLLM."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from flexprefill_fa.backends import BACKENDS
from flexprefill_fa.masks import DEFAULT_SELECTOR, Selector, default_selector, get_selector, selector_names
from flexprefill_fa.validation import check_integer

SECTION = "sparse_prefill"
"""The key in vLLM's `additional_config`."""
VARIABLE = "FLEXPREFILL_FA_VLLM"
"""The environment variable that holds the same settings as a JSON object."""

# A chunk of fewer queries, or one that sees fewer keys, gains less than its selection costs.
_MIN_PREFILL_TOKENS = 2048
_MIN_PROMPT_TOKENS = 8192
# A selector's rows are blocks of up to 128 queries, and speculative decoding must never be taken for a prefill.
LEAST_PREFILL_TOKENS = 128
FAILURES_IN_A_ROW = 3
"""Steps after which sparse attention that keeps failing is switched off."""
_LOG_SECONDS = 60
_OWN = ("selector", "min_prefill_tokens", "min_prompt_tokens", "backend", "log_seconds")


@dataclass(frozen=True)
class Settings:
    """What the backend does.

    Args:
        selector: which blocks are kept.
        min_prefill_tokens: prefill chunks of fewer queries go to the parent backend, in tokens, at least 128. By
            default 2048, or half of the engine's longest chunk where that is less.
        min_prompt_tokens: so do chunks that see fewer keys, cached ones included, in tokens.
        backend: FlexAttention's kernel: "auto", "TRITON" or "FLASH".
        log_seconds: a line with the density is logged at most this often, in seconds; 0 for none.
        source: where the settings came from, in words.
    """

    selector: Selector = dataclasses.field(default_factory=lambda: get_selector(DEFAULT_SELECTOR)())
    min_prefill_tokens: int = _MIN_PREFILL_TOKENS
    min_prompt_tokens: int = _MIN_PROMPT_TOKENS
    backend: str = "auto"
    log_seconds: int = _LOG_SECONDS
    source: str = "defaults"

    def describe(self, kernel: str) -> str:
        """One line for the log; `kernel` is FlexAttention's that runs, which "auto" does not say."""
        fields = dataclasses.asdict(self.selector)  # pyright: ignore[reportArgumentType]  # selectors are dataclasses
        given = ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)
        return (
            f"{self.selector.name} ({given}), kernel {kernel}, for prefill chunks of at least "
            f"{self.min_prefill_tokens} queries and {self.min_prompt_tokens} keys; settings from {self.source}"
        )


def longest_chunk(scheduler_config: Any) -> int:
    """Queries of the longest prefill chunk of an engine that is busy: every other request decodes one token.

    Args:
        scheduler_config: vLLM's; read are max_num_batched_tokens, max_num_scheduled_tokens (a lower limit, or None),
            max_num_seqs and long_prefill_token_threshold (0 for none).
    """
    budget = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    beside = max(1, budget - scheduler_config.max_num_seqs)
    return min(beside, scheduler_config.long_prefill_token_threshold or beside)


def engine_settings(vllm_config: Any) -> Settings:
    """`read_settings` for a VllmConfig."""
    return read_settings(vllm_config.additional_config, chunk=longest_chunk(vllm_config.scheduler_config))


def read_settings(
    additional_config: Any, environment: Mapping[str, str] = os.environ, chunk: int | None = None
) -> Settings:
    """The settings of an engine.

    Args:
        additional_config: vLLM's. What is under "sparse_prefill" counts, such as
            `{"sparse_prefill": {"selector": "peakprefill", "peak": 0.1, "min_prefill_tokens": 2048}}`: the keys are
            those of `Settings` and the fields of the selector. Without "selector", see `default_selector`.
        environment: where that is missing, the variable FLEXPREFILL_FA_VLLM, the same object as JSON.
        chunk: queries of the engine's longest chunk, which the default of `min_prefill_tokens` respects.

    Raises:
        ValueError: for an unknown key, a value out of its range, text that is not a JSON object, a setting beside
            "sparse_prefill" instead of under it, or a key that looks like it.
    """
    if isinstance(additional_config, Mapping):
        _check_top_level(additional_config)
        if SECTION in additional_config:
            return make_settings(additional_config[SECTION], f"additional_config[{SECTION!r}]", chunk)
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return make_settings({}, "defaults", chunk)
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the environment variable {VARIABLE} is not JSON: {error}") from error
    return make_settings(given, f"the environment variable {VARIABLE}", chunk)


def _check_top_level(additional_config: Mapping[Any, Any]) -> None:
    """Refuse what would be ignored: our settings in the wrong place, or under a misspelt key."""
    ours = {
        field.name for name in selector_names() for field in dataclasses.fields(cast(Any, get_selector(name)))
    } | set(_OWN)
    for name in additional_config:
        misspelt = name != SECTION and difflib.get_close_matches(str(name).lower(), [SECTION], cutoff=0.8)
        if misspelt or name in ours:
            raise ValueError(
                f"additional_config[{name!r}] is no setting: those of sparse prefill are expected under {SECTION!r}, "
                f'as in {{"{SECTION}": {{"peak": 0.2}}}}'
            )


def make_settings(given: Any, source: str, chunk: int | None = None) -> Settings:
    """Settings from a mapping, checked; `chunk` as for `read_settings`.

    Raises:
        ValueError: naming `source`, the key and what was expected.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{source} must be an object of settings, got {type(given).__name__} {given!r}")
    try:
        name = given.get("selector", default_selector(set(given) - set(_OWN)))
        if not isinstance(name, str):
            raise TypeError(f"selector must be a name, got {type(name).__name__} {name!r}")
        kind: Any = get_selector(name)
        fields = [field.name for field in dataclasses.fields(kind)]
        unknown = [name for name in given if name not in (*_OWN, *fields)]
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}, expected one of {', '.join((*_OWN, *fields))}")
        selector = kind(**{name: given[name] for name in fields if name in given})
        backend = given.get("backend", "auto")
        allowed = [name for name in BACKENDS if name != "CPU"]
        if backend not in allowed:
            raise ValueError(f"backend must be one of {', '.join(allowed)}, got {backend!r}")
        # Half: a chunk gets shorter still where several long prompts share a step.
        usual = _MIN_PREFILL_TOKENS if chunk is None else min(_MIN_PREFILL_TOKENS, chunk // 2)
        queries = given.get("min_prefill_tokens", max(usual, LEAST_PREFILL_TOKENS))
        check_integer("min_prefill_tokens", queries, LEAST_PREFILL_TOKENS)
        # A prompt of which the selector keeps every block gains nothing.
        keys = given.get("min_prompt_tokens", max(_MIN_PROMPT_TOKENS, selector.dense_tokens + 1))
        check_integer("min_prompt_tokens", keys, 1)
        seconds = given.get("log_seconds", _LOG_SECONDS)
        check_integer("log_seconds", seconds, 0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return Settings(selector, queries, keys, backend, seconds, source)
