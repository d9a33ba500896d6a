"""Settings of sparse prefill in a serving engine, the same for every engine. Imports no engine.

An engine's own module says where they stand in its configuration and which environment variable holds them otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from flexprefill_fa.backends import BACKENDS
from flexprefill_fa.masks import DEFAULT_SELECTOR, Selector, default_selector, get_selector, selector_names
from flexprefill_fa.validation import check_integer

SECTION = "sparse_prefill"
"""The key under which an engine's configuration holds the settings."""

# A chunk of fewer queries, or one that sees fewer keys, gains less than its selection costs.
_MIN_PREFILL_TOKENS = 2048
_MIN_PROMPT_TOKENS = 8192
# A selector's rows are blocks of up to 128 queries, and speculative decoding must never be taken for a prefill.
LEAST_PREFILL_TOKENS = 128
_LOG_SECONDS = 60
_OWN = ("selector", "min_prefill_tokens", "min_prompt_tokens", "backend", "log_seconds")


@dataclass(frozen=True)
class Settings:
    """What sparse prefill does in an engine, whose own backend is the *parent*.

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

    def never_reached(self, chunk: int, prompt: int, remedy: str) -> list[str]:
        """What keeps an engine's prompts or chunks below the thresholds, for its log.

        Args:
            chunk: queries of its longest chunk.
            prompt: tokens of its longest prompt.
            remedy: which of its options make chunks longer.
        """
        lines = []
        if prompt < self.min_prompt_tokens:
            lines.append(
                f"sparse prefill: nothing will run sparse: prompts have at most {prompt} tokens "
                f"(min_prompt_tokens is {self.min_prompt_tokens})"
            )
        if chunk < self.min_prefill_tokens:
            lines.append(
                f"sparse prefill: beside other requests a chunk has at most {chunk} queries (min_prefill_tokens is "
                f"{self.min_prefill_tokens}), and shorter chunks run dense: {remedy}, or lower min_prefill_tokens"
            )
        return lines


def read_settings(
    options: Any,
    place: str,
    variable: str,
    environment: Mapping[str, str],
    chunk: int | None = None,
    *,
    of_the_model: bool = False,
) -> Settings:
    """The settings of an engine.

    Args:
        options: a mapping of the engine's that passes through what it does not know; anything else holds no settings.
            What is under "sparse_prefill" counts, such as `{"sparse_prefill": {"selector": "peakprefill", "peak": 0.1,
            "min_prefill_tokens": 2048}}`: the keys are those of `Settings` and the fields of the selector. Without
            "selector", see `default_selector`.
        place: what the engine calls that mapping.
        variable: of the environment; where the mapping has no such key, it holds the same object as JSON.
        environment: its variables.
        chunk: queries of the engine's longest chunk, which the default of `min_prefill_tokens` respects.
        of_the_model: the mapping holds fields of the model's configuration too, which may be called as a setting is.

    Raises:
        ValueError: for an unknown key, a value out of its range, text that is not a JSON object, a setting beside
            "sparse_prefill" instead of under it, or a key that looks like it.
    """
    if isinstance(options, Mapping):
        _check_top_level(options, place, () if of_the_model else _names())
        if SECTION in options:
            return make_settings(options[SECTION], f"{place}[{SECTION!r}]", chunk)
    text = environment.get(variable, "").strip()
    if not text:
        return make_settings({}, "defaults", chunk)
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the environment variable {variable} is not JSON: {error}") from error
    return make_settings(given, f"the environment variable {variable}", chunk)


def _names() -> set[str]:
    """Of all settings."""
    return {field for fields in _fields_of_selectors().values() for field in fields} | set(_OWN)


def _check_top_level(options: Mapping[Any, Any], place: str, ours: Collection[str]) -> None:
    """Refuse what would be ignored: settings in the wrong place, or under a misspelt key."""
    for name in options:
        misspelt = name != SECTION and difflib.get_close_matches(str(name).lower(), [SECTION], cutoff=0.8)
        if misspelt or name in ours:
            raise ValueError(
                f"{place}[{name!r}] is no setting: those of sparse prefill are expected under {SECTION!r}, "
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
        name = given["selector"] if "selector" in given else _meant_selector(given)
        if not isinstance(name, str):
            raise TypeError(f"selector must be a name, got {type(name).__name__} {name!r}")
        kind: Any = get_selector(name)
        fields = _fields_of(name)
        unknown = [name for name in given if name not in (*_OWN, *fields)]
        if unknown:
            expected = ", ".join((*_OWN, *fields))
            raise ValueError(f"unknown setting {unknown[0]!r}, expected one of {expected} with the selector {name}")
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


def _meant_selector(given: Mapping[Any, Any]) -> str:
    """The selector of settings that do not name one.

    Raises:
        ValueError: where some of them are another selector's, which has to be named.
    """
    everybodys = _fields_of_selectors()
    known = [name for name in given if any(name in fields for fields in everybodys.values())]
    meant = default_selector(known)
    foreign = [name for name in known if name not in everybodys[meant]]
    if not foreign:
        return meant
    owners = [name for name, fields in everybodys.items() if set(known) <= set(fields)]
    some = ", ".join(map(repr, foreign))
    if not owners:
        of = [f"{name!r} is one of {_either(_owners(name, everybodys))}" for name in known]
        raise ValueError(f"no selector has all of these settings: {', '.join(of)}")
    raise ValueError(
        f"{some}: not of {meant}, which runs where no selector is named, but of {_either(owners)}: name it, "
        f'as in "selector": "{owners[0]}"'
    )


def _owners(field: str, everybodys: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for name, fields in everybodys.items() if field in fields]


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _fields_of(selector: str) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, get_selector(selector)))]


def _fields_of_selectors() -> dict[str, list[str]]:
    return {name: _fields_of(name) for name in selector_names()}
