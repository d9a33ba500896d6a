"""How prompts are read, as text: a selector with its settings, mean correction and layers that stay dense."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from flexprefill_fa.masks import get_selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.validation import check_correction_kind

DENSE = "dense"
"""The name of attention over every causal block, where selectors are named."""


class ChoiceError(ValueError):
    """A selector or a setting that does not exist, or a value out of range."""


def selector_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and fields of a selector written as `name` or `name:field=value+field=value`.

    Raises:
        ChoiceError: for a malformed pair, or a field that comes twice.
    """
    name, colon, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for pair in rest.split("+") if colon else ():
        field, equals, value = pair.partition("=")
        if not (field and equals and value):
            raise ChoiceError(f"selector {spec!r} must have the form name:field=value+field=value, got {pair!r}")
        if field in options:
            raise ChoiceError(f"selector {spec!r} sets {field} more than once")
        options[field] = _value(value)
    return name, options


def make_config(selector: str, **options: Any) -> Any:
    """The config of a selector from the options that were given; None means its own default.

    Raises:
        ChoiceError: for an unknown selector, an option that it does not have, or a value out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        kind: Any = get_selector(selector)
        names = [field.name for field in dataclasses.fields(kind)]
        for name in given:
            if name not in names:
                raise ValueError(f"selector {selector} has no {name}, only {', '.join(names)}")
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise ChoiceError(str(error)) from error


@dataclass(frozen=True)
class Choice:
    """How prompts are read.

    Attributes:
        config: the selector with its settings; None: dense.
        mean_correction, dense_layers: as for `enable_sparse_prefill`.
    """

    config: Any
    mean_correction: MeanCorrection = False
    dense_layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The selector's name, or "dense"."""
        return DENSE if self.config is None else self.config.name

    @property
    def options(self) -> dict[str, Any]:
        """What `enable_sparse_prefill` is given beside the config."""
        return {"mean_correction": self.mean_correction, "dense_layers": self.dense_layers}


def parse_choice(spec: str) -> Choice:
    """What a spec such as `flashprefill:alpha=0.1+mean_correction=true+dense_layers=0/4` asks for.

    Raises:
        ChoiceError: for an unknown selector, a field that it does not have, or a value out of range.
    """
    name, options = selector_spec(spec)
    if name == DENSE:
        if options:
            raise ChoiceError(f"{DENSE} has no settings, got {spec!r}")
        return Choice(None)
    correction = options.pop("mean_correction", False)
    dense_layers = str(options.pop("dense_layers", ""))
    if not re.fullmatch(r"(-?\d+(/-?\d+)*)?", dense_layers):
        raise ChoiceError(f"dense_layers must be layer indices such as 0/4, got {dense_layers!r} in selector {spec!r}")
    try:
        check_correction_kind(correction)
    except ValueError as error:
        raise ChoiceError(f"{error} in selector {spec!r}") from error
    layers = tuple(sorted({int(layer) for layer in dense_layers.split("/") if layer}))
    return Choice(make_config(name, **options), correction, layers)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
