"""Selectors by name, and the functions that make BlockMasks of them.

Every module of this package is imported, so that a selector is found once its file is here. Its class and
`create_<name>_block_mask` are names of this package and of `flexprefill_fa`.
"""

import importlib
import pkgutil
from typing import Any

from flexprefill_fa.masks.block_masks import create_block_mask, mask_function, select_blocks
from flexprefill_fa.masks.flashprefill import FlashPrefillConfig
from flexprefill_fa.masks.flexprefill import FlexPrefillConfig
from flexprefill_fa.masks.peakprefill import PeakPrefillConfig
from flexprefill_fa.masks.selector import DEFAULT_SELECTOR, Selector, default_selector, get_selector, selector_names
from flexprefill_fa.masks.shared_heads import share_heads
from flexprefill_fa.masks.streaming_llm import StreamingLLMConfig
from flexprefill_fa.masks.vertical_slash import VerticalSlashConfig

SelectorConfig = Selector  # its former name

create_flexprefill_block_mask = mask_function(FlexPrefillConfig)
create_flashprefill_block_mask = mask_function(FlashPrefillConfig)
create_peakprefill_block_mask = mask_function(PeakPrefillConfig)
create_streaming_llm_block_mask = mask_function(StreamingLLMConfig)
create_vertical_slash_block_mask = mask_function(VerticalSlashConfig)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_CLASSES = {get_selector(name).__name__: get_selector(name) for name in selector_names()}
_FUNCTIONS = {f"create_{name}_block_mask": get_selector(name) for name in selector_names()}
if len(_CLASSES) < len(_FUNCTIONS):
    raise ValueError(
        "selectors must have classes of different names, got "
        + ", ".join(f"{get_selector(name).__module__}.{get_selector(name).__name__}" for name in selector_names())
    )

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]  # by their files
    *_CLASSES,
    *_FUNCTIONS,
    "DEFAULT_SELECTOR",
    "Selector",
    "SelectorConfig",
    "create_block_mask",
    "default_selector",
    "get_selector",
    "select_blocks",
    "selector_names",
    "share_heads",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The selectors that have no line above."""
    if name in _CLASSES:
        return _CLASSES[name]
    if name in _FUNCTIONS:
        return globals().setdefault(name, mask_function(_FUNCTIONS[name]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
