"""How far a model with sparse prefill is from the dense one, on the same text: the distributions of the next token."""

FIDELITY_KIND = "fidelity"
"""Of the rows of `flexprefill fidelity`."""
