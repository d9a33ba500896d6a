"""PeakPrefill: a key block is kept if some query row needs it, seen through a few representatives of its keys."""

from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig

__all__ = ["PeakPrefillConfig"]
