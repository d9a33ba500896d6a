"""Whether switching sparse prefill on did anything: a model of which no layer can run sparse is an error."""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

from typing import Any

from .transformers import describe_sparse_prefill


def check_some_sparse(model: Any) -> None:
    """A model with sparse prefill on of which at least one layer runs sparse, or a ValueError that says why not."""
    layers = [layer for layer in describe_sparse_prefill(model) if layer.layer is not None]
    if all(layer.runs != "sparse" for layer in layers):
        first = layers[0]
        raise ValueError(f"no layer of this model can run sparse; layer {first.layer} runs {first.runs}: {first.why}")
