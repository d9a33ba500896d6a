"""Where the settings stand in vLLM: in the engine's `additional_config`, else in the environment. Imports no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import engine_settings
from .engine_settings import SECTION, Settings, make_settings

__all__ = ["SECTION", "VARIABLE", "Settings", "engine_settings_of", "longest_chunk", "make_settings", "read_settings"]

VARIABLE = "FLEXPREFILL_FA_VLLM"
"""The environment variable that holds the settings as a JSON object."""


def longest_chunk(scheduler_config: Any) -> int:
    """Queries of the longest prefill chunk of an engine that is busy: every other request decodes one token.

    Args:
        scheduler_config: vLLM's; read are max_num_batched_tokens, max_num_scheduled_tokens (a lower limit, or None),
            max_num_seqs and long_prefill_token_threshold (0 for none).
    """
    budget = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    beside = max(1, budget - scheduler_config.max_num_seqs)
    return min(beside, scheduler_config.long_prefill_token_threshold or beside)


def engine_settings_of(vllm_config: Any) -> Settings:
    """`read_settings` for a VllmConfig."""
    return read_settings(vllm_config.additional_config, chunk=longest_chunk(vllm_config.scheduler_config))


def read_settings(
    additional_config: Any, environment: Mapping[str, str] = os.environ, chunk: int | None = None
) -> Settings:
    """`engine_settings.read_settings` for vLLM's `additional_config`, else the variable FLEXPREFILL_FA_VLLM."""
    return engine_settings.read_settings(additional_config, "additional_config", VARIABLE, environment, chunk)
