"""Benchmarks and the needle model: part of a checkout, not of the installed package."""
