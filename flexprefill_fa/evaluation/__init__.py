"""Task accuracy of dense and sparse prefill: offline RULER tasks, lm-evaluation-harness, and one row per cell."""
