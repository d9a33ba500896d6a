"""The selectors that the shared tests run over: all of the registry, and the one that the documentation makes."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from flexprefill_fa import get_selector, selector_names

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding_a_selector.md"

# What leaves blocks out of a few hundred tokens; of every other selector its sparsest setting.
_SMALL: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.4, "tau": 0.1, "min_budget": 1},
    "flashprefill": {"alpha": 0.6, "sink_blocks": 1, "window_blocks": 1, "last_full_blocks": 0},
    "streaming_llm": {"sink": 64, "window": 100},
    "vertical_slash": {"vertical_size": 64, "slash_size": 130},
}


def documented(number: int) -> str:
    """The code of one of the document's Python blocks."""
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[number]


@cache
def define_documented(folder: Path) -> None:
    """Make the document's selector, from a file of its own as its reader would."""
    if "pooled_top" in selector_names():  # put where the document says
        return
    path = folder / "pooled_top.py"
    path.write_text(documented(0))
    spec = importlib.util.spec_from_file_location("pooled_top", path)
    assert spec is not None and spec.loader is not None
    sys.modules["pooled_top"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def example(name: str, block_size: int = 64, **fields: Any) -> Any:
    """A setting that leaves blocks out of short prompts."""
    kind: Any = get_selector(name)
    sparsest = {field: values[0] for field, values in kind.sweep.items()}
    return kind(**{**sparsest, **_SMALL.get(name, {}), "block_size": block_size, **fields})


def names() -> list[str]:
    return [*(name for name in selector_names() if name != "pooled_top"), "pooled_top"]
