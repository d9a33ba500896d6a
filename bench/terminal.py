"""What the benchmark commands share: mistakes told in one line."""

from __future__ import annotations

from functools import partial

from flexprefill_fa import loading

one_line_errors = partial(loading.one_line_errors, (loading.UsageError, ValueError))
"""As `loading.one_line_errors`, for numbers that a workload refuses and broken rows too."""
