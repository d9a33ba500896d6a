"""FlashPrefill: row by row, the key blocks whose pooled attention comes near the row's best block."""

from flexprefill_fa.masks.flashprefill.config import FlashPrefillConfig

__all__ = ["FlashPrefillConfig"]
