"""The vLLM backend's lines in vLLM's log. Imports no vLLM."""

from __future__ import annotations

from .engine_log import EngineLog

_log = EngineLog("vllm.flexprefill_fa")  # below vLLM's own logger, whose handlers print it
logger = _log.logger
log_once = _log.once
