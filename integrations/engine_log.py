"""Lines in an engine's own log. Imports no engine."""

from __future__ import annotations

import logging
import weakref
from typing import Any


class EngineLog:
    """A logger below an engine's, and what it said once for each engine in this process.

    Args:
        name: of the logger; a handler of the engine's has to print it.
    """

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)
        self._said: dict[int, set[str]] = {}

    def once(self, engine: Any, text: str, level: int = logging.INFO) -> None:
        """Log a line once for an engine.

        Args:
            engine: an object that lives as long as it, such as its configuration. It need not be hashable: it is known
                by its id, which is forgotten when it goes, so that a later engine at the same address says its own
                lines.
            text: the line.
            level: as for `logging`.
        """
        said = self._said.get(id(engine))
        if said is None:
            said = self._said[id(engine)] = set()
            weakref.finalize(engine, self._said.pop, id(engine), None)
        if text not in said:
            said.add(text)
            self.logger.log(level, "%s", text)
