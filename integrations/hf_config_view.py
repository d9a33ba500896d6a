"""A model's own view of its config, which says "flexprefill" to this model alone.

Modules read the name of their attention implementation from their config, and one config object may belong to several
models. So a model that is switched on reads a view in its place: it has the config's attributes, but for the
implementation, and what is set on it is set on the config too.
"""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import copy
import functools
import operator
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

_OWN = ("_attn_implementation", "_attn_implementation_internal")


class ConfigView:
    """Mixed into the class of the config. Copies and pickles are those of the config, and say what it says."""

    # The attributes are in a dictionary of its own, not read through a property: torch.compile takes an object's
    # dictionary first, whatever its class says.
    __slots__ = ("_holders", "_of")

    _of: Any
    _holders: int

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing: transformers makes a dataclass of every subclass of a config, with an `__init__` of its own."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # What transformers compares with, and makes default configs from.
        return self._of.__class__

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in _OWN or not self._holders:
            setattr(self._of, name, value)

    def __copy__(self) -> Any:
        return copy.copy(self._of)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By a function of the standard library: such a pickle needs nothing of this package.
        return operator.getitem, ((self._of,), 0)


def hold(view: Any) -> None:
    """Note that one more module holds a view."""
    object.__setattr__(view, "_holders", view._holders + 1)


def release(view: Any) -> None:
    """Note that a module gave it back. With the last it says what the config says, for whoever has kept it."""
    object.__setattr__(view, "_holders", view._holders - 1)
    if not view._holders:
        vars(view).update(vars(view._of))


def views_of(configs: Iterable[Any], implementation: str, known: dict[int, Any]) -> dict[int, Any]:
    """Views of configs, and of those on the way from one of them to another that is a section of it.

    Args:
        configs: what modules of one model hold.
        implementation: what the views say.
        known: views that the model has already, by the id of their config; they stay.

    Returns:
        By the id of the config; nobody holds the new ones yet.
    """
    configs, views = list(configs), dict(known)

    def view_of(config: Any) -> Any:
        if id(config) not in views:
            sections = {
                name: view_of(value)
                for name, value in vars(config).items()
                if isinstance(value, PreTrainedConfig) and any(_holds(value, other) for other in configs)
            }
            view = object.__new__(_view_class(config.__class__))
            object.__setattr__(view, "_of", config)
            object.__setattr__(view, "_holders", 0)
            vars(view).update(vars(config), **sections, _attn_implementation_internal=implementation)
            views[id(config)] = view
        return views[id(config)]

    for config in configs:
        view_of(config)
    return views


@functools.cache
def _view_class(config_class: type) -> type:
    # Cached, because a compiled model is guarded by the types of its attributes.
    body = {"__slots__": (), "__module__": config_class.__module__, "__qualname__": config_class.__qualname__}
    return type(config_class.__name__, (ConfigView, config_class), body)


def original(config: Any) -> Any:
    """The config that a view is of; any other config itself."""
    return original(config._of) if isinstance(config, ConfigView) else config


def _holds(config: PreTrainedConfig, wanted: PreTrainedConfig) -> bool:
    """Whether a config is another, or has it among its sections."""
    return config is wanted or any(
        _holds(value, wanted) for value in vars(config).values() if isinstance(value, PreTrainedConfig)
    )
