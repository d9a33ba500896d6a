"""What the options of `python -m bench` mean: lengths, selectors, densities, backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.choice import make_config, selector_spec
from flexprefill_fa.tools.loading import UsageError, token_count


def parse_list(option: str, text: str) -> list[str]:
    """The items of a comma-separated list, each once.

    Raises:
        UsageError: for an empty list or item, or one that comes twice.
    """
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UsageError(f"{option} must be a comma-separated list, got {text!r}")
    twice = sorted({item for item in items if items.count(item) > 1})
    if twice:
        raise UsageError(f"{option} must name each item once, got {', '.join(twice)} more than once")
    return items


def parse_lengths(text: str) -> list[int]:
    """Prompt lengths in tokens, ascending.

    Raises:
        UsageError: for anything but whole numbers from 1.
    """
    return sorted(token_count(item) for item in parse_list("lengths", text))


def parse_layers(text: str | None, layers: int) -> list[int]:
    """Numbers of a model's layers, ascending; all `layers` of them for None.

    Raises:
        UsageError: for anything but whole numbers in [0, layers).
    """
    if text is None:
        return list(range(layers))
    numbers = []
    for item in parse_list("layers", text):
        if not item.isdecimal() or int(item) >= layers:
            raise UsageError(f"layers must be whole numbers in [0, {layers}), got {item!r}")
        numbers.append(int(item))
    return sorted(numbers)


def parse_numbers(option: str, text: str, most: float) -> list[float]:
    """Positive numbers, in the order given.

    Raises:
        UsageError: for anything but numbers in (0, most].
    """
    numbers = []
    for item in parse_list(option, text):
        try:
            number = float(item)
        except ValueError:
            number = math.nan
        if not 0 < number <= most:
            raise UsageError(f"{option} must be in (0, {most:g}], got {item!r}")
        numbers.append(number)
    return numbers


def parse_selector(spec: str) -> Any:
    """The config of `name` or `name:field=value+field=value`, by the selector's own fields.

    Raises:
        UsageError: for an unknown selector or field, a malformed pair, or a value that the selector refuses.
    """
    name, options = selector_spec(spec)
    return make_config(name, **options)


def check_backends(
    backends: Sequence[str], dtype: torch.dtype, head_dim: int, block_sizes: Sequence[int], device: torch.device
) -> None:
    """Check that each backend can run here at all.

    Raises:
        UsageError: saying which cannot, and why.
    """
    probe = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    for backend in backends:
        for block_size in block_sizes:
            try:
                resolve_backend(backend, probe, block_size)
            except ValueError as error:
                raise UsageError(str(error)) from error
