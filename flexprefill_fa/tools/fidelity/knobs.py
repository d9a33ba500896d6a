"""The one setting of each selector that trades density for fidelity, and how a search walks along it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexprefill_fa.masks import get_selector
from flexprefill_fa.tools.loading import UsageError

_LEAST = 1e-4
"""The smallest threshold that is tried, and the smallest share that is left uncovered."""
_MOST_UNCOVERED = 0.9


def knob_fields(selector: str) -> tuple[str, ...]:
    """The fields of a selector's knob, which are turned together; none where it has no knob."""
    return tuple(get_selector(selector).sweep)


@dataclass(frozen=True)
class Knob:
    """A selector's knob at one length.

    Attributes:
        fields: of its config, set to the same value.
        value: from a place in [0, 1], where 0 is the sparsest setting and 1 the densest, to the fields' value: equal
            steps of place are equal factors of what is left out, of the threshold, or of the tokens.
    """

    fields: tuple[str, ...]
    value: Callable[[float], float | int]

    def place(self, config: Any) -> float:
        """Where a config's knob stands: the sparsest place whose value is no sparser; an end for a value beyond it."""
        wanted, rising = getattr(config, self.fields[0]), self.value(1) > self.value(0)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            value = self.value(middle)
            low, high = (middle, high) if (value < wanted if rising else value > wanted) else (low, middle)
        return high

    def turn(self, config: Any, place: float) -> Any:
        """A config with the knob at a place."""
        return dataclasses.replace(config, **dict.fromkeys(self.fields, self.value(place)))


def find_knob(config: Any, length: int) -> Knob:
    """The knob of a config's selector for texts of a length in tokens.

    Raises:
        UsageError: where it has none that is known.
    """
    fields = knob_fields(config.name)
    size = config.block_size

    def share(place: float) -> float:
        return round(1 - _digits(_MOST_UNCOVERED * (_LEAST / _MOST_UNCOVERED) ** place), 8)

    def threshold(place: float) -> float:
        return _digits(_LEAST**place)

    def tokens(place: float) -> int:
        blocks = max(1.0, length / size) ** place
        return size * round(blocks)

    scales: dict[str, Callable[[float], float | int]] = {
        **dict.fromkeys(("gamma", "threshold", "share"), share),
        "alpha": threshold,
        "peak": lambda place: min(0.99, threshold(place)),  # which is below 1
        **dict.fromkeys(("window", "vertical_size"), tokens),
    }
    if not fields:
        raise UsageError(f"selector {config.name} has no setting that can be searched: expected a class with a sweep")
    return Knob(fields, scales.get(fields[0], _between(get_selector(config.name).sweep[fields[0]])))


def _between(values: Sequence[Any]) -> Callable[[float], float | int]:
    """From the first of a sweep's values to the last: equal steps are equal factors."""
    first, last = float(values[0]), float(values[-1])
    whole = all(isinstance(value, int) for value in values)

    def value(place: float) -> float | int:
        found = first * (last / first) ** place
        return round(found) if whole else _digits(found)

    return value


def _digits(value: float) -> float:
    """Three significant ones, so that what is printed is what was measured."""
    return float(f"{value:.3g}")
