"""FlexPrefill: query-aware and vertical-slash heads, each just large enough to cover a share gamma of the attention."""

from flexprefill_fa.masks.flexprefill.config import FlexPrefillConfig

__all__ = ["FlexPrefillConfig"]
