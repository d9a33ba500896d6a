"""Tensor parallelism: transformers gives each rank some of a layer's heads, and they must be heads that it can serve.

A rank that has whole heads, with the kv heads that its query heads read, selects and attends as one process would for
them; nothing is exchanged.
"""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

# Projections of a layer whose outputs are its heads, each head's features side by side.
_QUERIES = ("q_proj", "q_b_proj", "query_key_value")
_KEYS = ("k_proj", "kv_b_proj", "query_key_value")
_SHARED_OUT = "colwise"  # the style of tensor parallelism under which a rank keeps its part of the output


def check_heads(what: str, query_heads: int, kv_heads: int, ranks: int) -> None:
    """Whether every rank gets whole heads, and as many as the others.

    Args:
        what: the model or layer, for the message.
        query_heads: of the whole layer. kv_heads: of the whole layer.
        ranks: over which they are shared out.

    Raises:
        ValueError: if not.
    """
    if query_heads % ranks or kv_heads % ranks:
        raise ValueError(
            f"{what} has {query_heads} query heads and {kv_heads} kv heads: tensor parallelism needs a number of ranks "
            f"that divides both, got {ranks}"
        )


def check_ranks(model: PreTrainedModel, layers: Mapping[int, nn.Module]) -> None:
    """Whether the ranks that share a model have heads of each layer that go together; nothing for a whole model.

    Args:
        model: as transformers distributed it.
        layers: its attention layers, by index.

    Raises:
        ValueError: if they have not.
    """
    ranks = model.tp_size or 1
    if ranks == 1:
        return
    names = {module: name for name, module in model.named_modules()}
    for index, module in layers.items():
        prefix = re.sub(r"\.\d+(?=\.|$)", ".*", names[module])  # as the plan writes layer numbers
        queries, keys = (
            any(model.tp_plan.get(f"{prefix}.{name}") == _SHARED_OUT for name in projections)
            for projections in (_QUERIES, _KEYS)
        )
        what = f"layer {index} ({type(module).__name__})"
        if queries != keys:
            shared, whole = ("query", "kv") if queries else ("kv", "query")
            raise ValueError(
                f"{what}: tensor parallelism must share out query heads and kv heads alike, so that a query head keeps "
                f"its kv head, got a tp_plan for its {shared} heads and none for its {whole} heads"
            )
        if queries:
            check_heads(what, *_heads(module), ranks)


def _heads(module: nn.Module) -> tuple[int, int]:
    """(query heads, kv heads) of a layer on all ranks together."""
    query_heads: int = module.config.num_attention_heads  # type: ignore[union-attr, assignment]
    return query_heads, query_heads // getattr(module, "num_key_value_groups", 1)  # layers of one model may differ


def own_part(values: Tensor) -> Tensor:
    """What this rank has of a tensor that is shared out, as a plain one; any other tensor as it is."""
    to_local = getattr(values, "to_local", None)  # of DTensors alone
    return values if to_local is None else to_local()
