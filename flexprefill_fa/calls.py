"""Attention calls that are alike: checked, planned and, if asked for, captured as a CUDA graph once.

No check and no plan looks into a tensor, so that shapes, dtypes, devices, settings and options are all they depend on.
A call with something else to it is checked and planned each time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flexprefill_fa import dispatch
from flexprefill_fa.autocast import as_sdpa_casts
from flexprefill_fa.dispatch import Found, Prepared, Request
from flexprefill_fa.masks.selector import Selector, is_registered
from flexprefill_fa.replay import nothing_watches
from flexprefill_fa.validation import DEVICES, check_mean_correction, check_query_key, check_scale, check_value

_MOST = 1024  # kinds of calls: lengths x settings of one process
_known: dict[Hashable, Prepared] = {}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Selector | None,
    request: Request,
    *,
    block_size: int = 128,
    graph: str = "never",
    selected: bool = False,
) -> Found:
    """Attention as it was asked for, on tensors that nobody has checked.

    Args:
        query, key, value: as for `sparse_prefill_attention`.
        config: a selector; None: dense attention, in blocks of `block_size`.
        request: what else was asked for, starts and lengths checked.
        graph: "never", or "auto" to capture and replay calls that come again, see `graph_cache.py`.
        selected: whether the selection is wanted, which a graph does not give.

    Returns:
        `[B, Hq, Lq, D]`; what makes the selection that was computed, where it is wanted; whether it is the selector's.

    Raises:
        ValueError, TypeError: for arguments that do not fit, or a backend that cannot run.
    """
    kind = kind_of(query, key, value, config, request)
    prepared = None if kind is None else _find(kind)  # a graph that is traced must not depend on what is known
    if prepared is None:
        check_query_key(query, key)
        check_value(key, value)
        check_scale(request.scale)
        check_mean_correction(request.mean_correction, request.mask_mod, request.score_mod, query.device)
        query, key, value = as_sdpa_casts(query, key, value)
        prepared = dispatch.prepare(query, key, config, request, block_size)
        _remember(kind, prepared)
    run = partial(dispatch.run, prepared, query, key, value, request.starts, request.lengths)
    if graph == "never" or kind is None:
        return run()
    from flexprefill_fa.graph_cache import GRAPHS  # which needs this function

    if config is not None and prepared.plan.sparse and not selected:
        out = GRAPHS.replay(kind, query, key, value, config, request)
        if out is not None:
            return out, _not_selected, True
    return GRAPHS.give_way(run)


def _not_selected() -> Any:
    raise RuntimeError("a CUDA graph gives no selection: expected a call with selected=True")


def kind_of(query: Tensor, key: Tensor, value: Tensor, config: Any, request: Request) -> Hashable | None:
    """What the checks and the plan of a call depend on.

    None where they may depend on more: under autocast, a mode or a transform, for inputs that require grad, for tensors
    of a subclass, and with mods, sinks or a settings tensor. Settings and options count with their types: 1 is not
    True.
    """
    if is_dynamo_compiling() or not nothing_watches():
        return None
    if not (type(query) is type(key) is type(value) is Tensor and is_registered(type(config))):
        return None
    if not (request.mask_mod is request.score_mod is request.sinks is request.settings is None):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    place = query.device
    if place.type not in DEVICES or torch.is_autocast_enabled(place.type) or not is_dataclass(config):
        return None
    options = (request.scale, request.mean_correction, request.dense, request.backend, request.min_tokens)
    values = (*(getattr(config, name) for name in config.__dataclass_fields__), *options)
    shapes = query.shape, key.shape, value.shape, request.starts is None, request.lengths is None
    kinds = query.dtype, key.dtype, value.dtype, place, key.device, value.device, torch.is_inference_mode_enabled()
    return type(config), shapes, kinds, values, tuple(map(type, values))


def _find(kind: Hashable) -> Prepared | None:
    """What was decided about calls of a kind."""
    try:
        return _known.get(kind)
    except TypeError:  # an option that cannot be a key is refused by its check
        return None


def _remember(kind: Hashable | None, prepared: Prepared) -> None:
    """Keep what was decided about calls of a kind, unless the kind is None."""
    if kind is not None:
        if len(_known) >= _MOST:
            _known.clear()
        _known[kind] = prepared
