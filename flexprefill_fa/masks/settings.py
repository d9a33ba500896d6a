"""A selector's fields as numbers, so that one compiled graph serves every setting, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

NONE = -math.inf  # what stands for None


@dataclass(frozen=True)
class Travelling:
    """A field that travels as a number: as itself, or as the place of its value among `choices`."""

    name: str
    kind: Callable[[float], Any]
    optional: bool
    choices: tuple[Any, ...] = ()


# Arguments beside a selector's own: of the functions that make BlockMasks, and of vLLM's settings.
_BESIDE_ITS_OWN = "name query key value config lengths starts scale eager_safe mean_correction dense_layers"
_OF_VLLM = "selector backend log_seconds min_prefill_tokens min_prompt_tokens"
_RESERVED = frozenset(f"{_BESIDE_ITS_OWN} {_OF_VLLM}".split())


def _of_base(kind: type) -> set[str]:
    """Names that its base classes have, other than their fields."""
    return {name for base in kind.__mro__[1:] for name in vars(base)} - {
        field for base in kind.__mro__[1:] for field in getattr(base, "__dataclass_fields__", ())
    }


def travelling_fields(kind: type) -> tuple[Travelling, ...]:
    """The fields of a dataclass in the making, in order, without `block_size`, which travels by itself.

    Raises:
        TypeError: for a field whose type does not travel.
    """
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise TypeError(
            f"{kind.__name__}: the type of a field is not known in its module ({error}): import or define it there"
        ) from error
    names = [name for part in reversed(kind.__mro__) for name in vars(part).get("__annotations__", {})]
    found = []
    for name in dict.fromkeys(names):
        hint = hints[name]
        if name == "block_size" or hint is ClassVar or get_origin(hint) is ClassVar:
            continue
        if name in _RESERVED or name in _of_base(kind):
            raise TypeError(
                f"{kind.__name__}.{name} is a name that selectors need themselves: call the field another way"
            )
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        others = [part for part in parts if part is not NoneType]
        if len(others) == 1 and get_origin(others[0]) is Literal:
            found.append(Travelling(name, int, len(parts) > 1, get_args(others[0])))
        elif len(others) == 1 and others[0] in (bool, int, float):
            found.append(Travelling(name, others[0], len(parts) > 1))
        else:
            raise TypeError(
                f"{kind.__name__}.{name} cannot travel as a number: expected bool, int, float or a Literal, "
                f"or one of them or None, got {hint}"
            )
    return tuple(found)


def as_settings(config: Any, fields: Sequence[Travelling]) -> Tensor:
    """float64 `[fields]` on the CPU.

    Raises:
        ValueError, TypeError: for a value that its field cannot have.
    """
    numbers = [_number(getattr(config, field.name), field, config) for field in fields]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _number(value: Any, field: Travelling, config: Any) -> float:
    if value is None and field.optional:
        return NONE
    if field.choices:
        if value not in field.choices:
            raise ValueError(f"{type(config).__name__}.{field.name} must be one of {field.choices}, got {value!r}")
        return float(field.choices.index(value))
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"{type(config).__name__}.{field.name} must be a number, got {type(value).__name__} {value!r}")
    number = float(value)
    if number != number or abs(number) == math.inf:
        raise ValueError(f"{type(config).__name__}.{field.name} must be finite, got {value}")
    if field.kind(number) != value or isinstance(value, bool) != (field.kind is bool):
        kind = getattr(field.kind, "__name__", field.kind)
        raise TypeError(f"{type(config).__name__}.{field.name} must be a {kind}, got {type(value).__name__} {value!r}")
    return number


def of_settings(kind: Any, fields: tuple[Travelling, ...], settings: Tensor, block_size: int) -> Any:
    """The inverse of `as_settings`; a config that came before is not made and checked again."""
    return _config(kind, fields, tuple(settings.tolist()), block_size)


@functools.lru_cache(maxsize=4096)
def _config(kind: Any, fields: tuple[Travelling, ...], numbers: tuple[float, ...], block_size: int) -> Any:
    values: dict[str, Any] = {"block_size": block_size}
    for field, number in zip(fields, numbers, strict=True):
        value = None if number == NONE else field.kind(number)
        values[field.name] = field.choices[value] if field.choices and value is not None else value
    return kind(**values)
