"""Where the settings stand in SGLang: in `--json-model-override-args`, else in the environment. Imports no SGLang."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from . import engine_settings
from .engine_settings import Settings

VARIABLE = "FLEXPREFILL_FA_SGLANG"
"""The environment variable that holds the settings as a JSON object."""

_PLACE = "json_model_override_args"


def longest_chunk(chunked_prefill_size: int | None, max_prefill_tokens: int, context_len: int) -> int:
    """Queries of the longest prefill chunk of an engine.

    Args:
        chunked_prefill_size: SGLang's; None or -1 where prompts are not cut, and a step is as long as
            max_prefill_tokens or one prompt.
        max_prefill_tokens: SGLang's.
        context_len: tokens of the longest prompt.
    """
    if chunked_prefill_size is None or chunked_prefill_size <= 0:
        return max(max_prefill_tokens, context_len)
    return min(chunked_prefill_size, context_len)


def read_settings(
    overrides: str | None, environment: Mapping[str, str] = os.environ, chunk: int | None = None
) -> Settings:
    """`engine_settings.read_settings` for SGLang, which has no options for plug-ins.

    Args:
        overrides: the JSON text of `--json-model-override-args`, which SGLang adds to the model's configuration: what
            the model does not know it passes through, to every process and node of the engine.
        environment, chunk: as for `engine_settings.read_settings`; the variable is FLEXPREFILL_FA_SGLANG.

    Raises:
        ValueError: as there, and for text that is not JSON.
    """
    try:
        options = json.loads(overrides) if overrides else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--json-model-override-args is not JSON: {error}") from error
    return engine_settings.read_settings(options, _PLACE, VARIABLE, environment, chunk, of_the_model=True)
