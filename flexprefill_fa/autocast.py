"""What `torch.autocast` means here: inputs become what SDPA would make of them, selection and sums stay in fp32."""

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


def as_sdpa_casts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in autocast's dtype where it is on for their device, else as they are; float64 stays."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (query.dtype, key.dtype, value.dtype):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast off for a device; nothing where it is off already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def no_autocast(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function of tensors, computed as written also under autocast."""

    @wraps(function)
    def run(*arguments: _P.args, **named: _P.kwargs) -> _T:
        device = next(x.device.type for x in (*arguments, *named.values()) if isinstance(x, Tensor))
        with without_autocast(device):
            return function(*arguments, **named)

    return run
