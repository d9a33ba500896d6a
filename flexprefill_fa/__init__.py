"""Block-sparse prefill attention for long prompts, on PyTorch FlexAttention."""

from typing import Any

from flexprefill_fa import masks
from flexprefill_fa.attention import block_sparse_attention, sparse_prefill_attention
from flexprefill_fa.composition import intersection, union
from flexprefill_fa.cuda_graphs import PrefillGraph
from flexprefill_fa.graph_cache import release_graphs
from flexprefill_fa.masks import (
    FlashPrefillConfig,
    FlexPrefillConfig,
    PeakPrefillConfig,
    Selector,
    StreamingLLMConfig,
    VerticalSlashConfig,
    create_block_mask,
    create_flashprefill_block_mask,
    create_flexprefill_block_mask,
    create_peakprefill_block_mask,
    create_streaming_llm_block_mask,
    create_vertical_slash_block_mask,
    get_selector,
    select_blocks,
    selector_names,
)
from flexprefill_fa.selection import BlockSelection

__version__ = "0.2.0"

__all__ = [
    "BlockSelection",
    "FlashPrefillConfig",
    "FlexPrefillConfig",
    "PeakPrefillConfig",
    "PrefillGraph",
    "Selector",
    "StreamingLLMConfig",
    "VerticalSlashConfig",
    "block_sparse_attention",
    "create_block_mask",
    "create_flashprefill_block_mask",
    "create_flexprefill_block_mask",
    "create_peakprefill_block_mask",
    "create_streaming_llm_block_mask",
    "create_vertical_slash_block_mask",
    "get_selector",
    "intersection",
    "release_graphs",
    "select_blocks",
    "selector_names",
    "sparse_prefill_attention",
    "union",
]
__all__ += [name for name in masks.__all__ if name not in __all__]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Selectors by their files, see `masks`."""
    return getattr(masks, name)
