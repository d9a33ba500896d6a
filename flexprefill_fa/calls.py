"""What is decided about a call, once for calls that are alike: its checks, its plan and its settings tensor.

None of these looks into a tensor, so that shapes, dtypes, devices, settings and options are all they depend on. A call
with something else to it is checked and planned each time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flexprefill_fa.dispatch import Prepared
from flexprefill_fa.masks.selector import is_registered
from flexprefill_fa.replay import nothing_watches
from flexprefill_fa.validation import DEVICES

_MOST = 1024  # kinds of calls: lengths x settings of one process
_known: dict[Hashable, Prepared] = {}


def kind_of(query: Tensor, key: Tensor, value: Tensor, config: Any, options: tuple[Any, ...]) -> Hashable | None:
    """What the checks and the plan of a call depend on.

    None where they may depend on more: under autocast, a mode or a transform, for inputs that require grad and for
    tensors of a subclass. Settings and options count with their types: 1 is not True.
    """
    if is_dynamo_compiling() or not nothing_watches():
        return None
    if not (type(query) is type(key) is type(value) is Tensor and is_registered(type(config))):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    place = query.device
    if place.type not in DEVICES or torch.is_autocast_enabled(place.type) or not is_dataclass(config):
        return None
    values = (*(getattr(config, name) for name in config.__dataclass_fields__), *options)
    shapes = query.shape, key.shape, value.shape
    kinds = query.dtype, key.dtype, value.dtype, place, key.device, value.device, torch.is_inference_mode_enabled()
    return type(config), shapes, kinds, values, tuple(map(type, values))


def known(kind: Hashable | None) -> Prepared | None:
    """What was decided about calls of a kind."""
    try:
        return _known.get(kind)
    except TypeError:  # an option that cannot be a key is refused by its check
        return None


def remember(kind: Hashable | None, prepared: Prepared) -> None:
    """Keep what was decided about calls of a kind, unless the kind is None."""
    if kind is not None:
        if len(_known) >= _MOST:
            _known.clear()
        _known[kind] = prepared
