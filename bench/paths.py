"""Where the checkout is, and where its result rows are."""

from flexprefill_fa.tools.rows import CHECKOUT as ROOT

RESULTS = ROOT / "bench" / "results"

__all__ = ["RESULTS", "ROOT"]
