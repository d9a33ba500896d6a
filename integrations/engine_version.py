"""Whether an installed engine has what an integration needs of it. Imports no engine until asked."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any


def look_up(
    modules: Mapping[str, tuple[str, ...]], signatures: Mapping[str, Mapping[str, str]]
) -> tuple[list[str], dict[str, Any]]:
    """What an engine lacks, in words, and what was found.

    Args:
        modules: module -> names in it, which may be `Class.member`.
        signatures: class -> method -> the arguments that it is called with, or that it calls ours with, by position;
            the classes are among the names.

    Returns:
        What is missing, empty where nothing is; and each class or function by its name, None where it is missing.
    """
    lacks, found = [], {}
    for module, names in modules.items():
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            lacks.append(f"the module {module} ({error})")
            continue
        for name in names:
            owner, _, member = name.partition(".")
            found[owner] = getattr(imported, owner, None)
            if found[owner] is None or (member and not hasattr(found[owner], member)):
                lacks.append(f"{module}.{name}")
    for owner, methods in signatures.items():
        lacks += _other_signatures(found[owner], methods) if found.get(owner) else []
    return lacks, found


def _other_signatures(owner: Any, methods: Mapping[str, str]) -> list[str]:
    lacks = []
    for name, arguments in methods.items():
        expected = arguments.split()
        method = getattr(owner, name, None)
        given = [] if method is None else [given for given in inspect.signature(method).parameters if given != "self"]
        if given[: len(expected)] != expected:
            lacks.append(f"{owner.__name__}.{name}({', '.join(expected)}), got ({', '.join(given)})")
    return lacks
