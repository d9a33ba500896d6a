"""Benchmarks and the needle model: part of a checkout, not of the installed package."""

from flexprefill_fa.tools.rows import CHECKOUT as ROOT

RESULTS = ROOT / "bench" / "results"

__all__ = ["RESULTS", "ROOT"]
