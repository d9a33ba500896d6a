"""Tensor parallelism: transformers gives each rank some of a layer's heads, and they must be heads that it can serve.

A rank that has whole heads, with the kv heads that its query heads read, selects and attends as one process would for
them; nothing is exchanged.
"""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# Projections whose outputs are a layer's heads say so in their names: q_proj, q_gate_proj, kv_b_proj, query_key_value.
_QUERIES = re.compile(r"(?:^|_)(?:q|qkv|query)(?:_|$)")
_KEYS = re.compile(r"(?:^|_)(?:k|kv|qkv|key)(?:_|$)")
_OF_ATTENTION = re.compile(r"att(?:n|ention)(?:\.\*)?\.(\w+)$")  # a projection in a plan
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
        shared = [
            name
            for name, _ in module.named_children()
            if model.tp_plan.get(f"{prefix}.{name}") == _SHARED_OUT and (_QUERIES.search(name) or _KEYS.search(name))
        ]
        queries, keys = (any(pattern.search(name) for name in shared) for pattern in (_QUERIES, _KEYS))
        what = f"layer {index} ({type(module).__name__})"
        if queries != keys:
            raise ValueError(
                f"{what}: tensor parallelism must share out query heads and kv heads alike, so that a query head keeps "
                f"its kv head, got a tp_plan that shares out {', '.join(shared)} alone"
            )
        if queries:
            check_heads(what, *_heads(module), ranks)


def check_config(config: Any) -> None:
    """The same as far as a config says it: all that there is before a model that chose its attention by name runs.

    Args:
        config: of the model. Nothing is checked under a plan that the caller wrote, for layers of several kinds, or for
            the text part of a larger model, whose config does not know of the ranks.

    Raises:
        ValueError: for a number of ranks that does not divide the heads.
    """
    distributed: Any = getattr(config, "distributed_config", None)
    ranks = getattr(distributed, "tp_size", None) or 1
    if ranks == 1 or isinstance(distributed.tp_plan, dict) or distributed.enable_expert_parallel:
        return
    if getattr(config, "is_heterogeneous", False):
        return
    found = ((_OF_ATTENTION.search(name), style) for name, style in (config.base_model_tp_plan or {}).items())
    if any(match and style == _SHARED_OUT and _QUERIES.search(match[1]) for match, style in found):
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        check_heads(f"this {config.model_type} model", heads, kv_heads, ranks)


def _heads(module: nn.Module) -> tuple[int, int]:
    """(query heads, kv heads) of a layer on all ranks together."""
    # Layers of one model may differ, so the layer's own numbers count before its config's.
    config: Any = module.config
    query_heads: int = getattr(module, "num_heads", None) or config.num_attention_heads
    return query_heads, query_heads // getattr(module, "num_key_value_groups", 1)


def own_part(values: Tensor) -> Tensor:
    """What this rank has of a tensor that is shared out, as a plain one; any other tensor as it is."""
    to_local = getattr(values, "to_local", None)  # of DTensors alone
    return values if to_local is None else to_local()
