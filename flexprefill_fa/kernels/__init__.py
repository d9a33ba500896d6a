"""Triton building blocks that more than one selector uses. Importing them needs triton."""
