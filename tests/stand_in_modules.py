"""Modules that stand in for those of an engine which is not installed."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PACKAGE = "flexprefill_fa.integrations"


@contextmanager
def stand_in_modules(contents: Mapping[str, Mapping[str, Any]], ours: Sequence[str]) -> Iterator[None]:
    """Have modules importable for as long as the context lasts, and those of ours that import them loaded anew.

    Args:
        contents: the attributes of each, by its name.
        ours: modules of the integrations.
    """
    before = {name: sys.modules.pop(name, None) for name in [*contents, *(f"{PACKAGE}.{name}" for name in ours)]}
    package: Any = importlib.import_module(PACKAGE)
    try:
        for name, attributes in contents.items():
            module = types.ModuleType(name)
            vars(module).update(attributes)
            module.__path__ = []
            sys.modules[name] = module
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for name in ours:
            vars(package).pop(name, None)
