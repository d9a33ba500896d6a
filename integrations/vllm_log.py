"""The vLLM backend's lines in vLLM's log. Imports no vLLM."""

from __future__ import annotations

import logging
import weakref
from typing import Any

# Below vLLM's own logger, whose handlers print it.
logger = logging.getLogger("vllm.flexprefill_fa")

_said: dict[int, set[str]] = {}


def log_once(config: Any, text: str, level: int = logging.INFO) -> None:
    """Log a line once for an engine.

    Args:
        config: vLLM's configuration of the engine. It cannot be hashed, so it is known by its id, which is forgotten
            when the configuration goes: a later engine at the same address says its own lines.
        text: the line.
        level: as for `logging`.
    """
    said = _said.get(id(config))
    if said is None:
        said = _said[id(config)] = set()
        weakref.finalize(config, _said.pop, id(config), None)
    if text not in said:
        said.add(text)
        logger.log(level, "%s", text)
