"""Block-sparse prefill attention for long prompts, on PyTorch FlexAttention."""

from flexprefill_fa.attention import block_sparse_attention, sparse_prefill_attention
from flexprefill_fa.composition import intersection, union
from flexprefill_fa.cuda_graphs import PrefillGraph
from flexprefill_fa.masks import (
    FlashPrefillConfig,
    FlexPrefillConfig,
    StreamingLLMConfig,
    VerticalSlashConfig,
    create_flashprefill_block_mask,
    create_flexprefill_block_mask,
    create_streaming_llm_block_mask,
    create_vertical_slash_block_mask,
    get_selector,
    select_blocks,
)
from flexprefill_fa.selection import BlockSelection

__version__ = "0.1.0"

__all__ = [
    "BlockSelection",
    "FlashPrefillConfig",
    "FlexPrefillConfig",
    "PrefillGraph",
    "StreamingLLMConfig",
    "VerticalSlashConfig",
    "block_sparse_attention",
    "create_flashprefill_block_mask",
    "create_flexprefill_block_mask",
    "create_streaming_llm_block_mask",
    "create_vertical_slash_block_mask",
    "get_selector",
    "intersection",
    "select_blocks",
    "sparse_prefill_attention",
    "union",
]
