"""Task accuracy of dense and sparse prefill: offline RULER tasks, lm-evaluation-harness, and one row per cell."""

ACCURACY_KIND = "accuracy"
"""The kind of the rows of `flexprefill eval`."""
