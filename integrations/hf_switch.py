"""Sparse prefill switched on: which modules, by which handles, and what they had before.

A module may be switched on by several handles at once, of the model and of models inside it. It is sparse while any of
them is on, as the latest says, and has its own config object back when none is.
"""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from .hf_config_view import hold, release, views_of
from .hf_layers import Layout, unwrap
from .hf_plan import PLAN_ATTRIBUTE, LayerPlan, LayerStatistics

NAME = "flexprefill"
"""Of the attention implementation."""


class SparsePrefill:
    """Sparse prefill switched on for a model; a context manager, or call `disable()`.

    Several may be on for one model, and for models inside it: the latest counts, and they may be switched off in any
    order. The model is held weakly: being sparse keeps no model alive.

    Args:
        model: to switch on now.
        plans: what each of its layers does, by index.
    """

    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, model: PreTrainedModel, plans: dict[int, LayerPlan]) -> None:
        self._number = next(self._numbers)
        self._plans = plans
        layout = Layout.of(model)
        self._switched: WeakKeyDictionary[nn.Module, LayerPlan | None] = WeakKeyDictionary()
        self._switched.update(dict.fromkeys(layout.holders))  # they have a config and no plan
        self._switched.update({module: plans[index] for module, index in layout.layers.items()})
        known = {id(state.config): state.view for module in model.modules() if (state := _on.get(module))}
        befores = {module: _on[module].config if module in _on else vars(module)["config"] for module in self._switched}
        views = views_of(befores.values(), NAME, known)
        for module, config in befores.items():
            if module not in _on:
                _on[module] = _State(module, config, views[id(config)])
            _on[module].add(self, module)

    @classmethod
    def all_of(cls, model: Any) -> list[SparsePrefill]:
        """Those that are on for a model or a part of it, the latest last."""
        found = {handle for module in unwrap(model).modules() if module in _on for handle in _on[module].handles}
        return sorted(found, key=lambda handle: handle._number)

    def disable(self) -> None:
        """Give the model back what it had without this; a second call does nothing."""
        for module in self._switched:
            state = _on.get(module)
            if state is not None and self in state.handles and not state.remove(self, module):
                del _on[module]

    @property
    def corrected(self) -> bool:
        """Whether dropped blocks count in every layer that runs a selector."""
        chosen = [plan for plan in self._plans.values() if plan.config is not None and plan.window is None]
        return bool(chosen) and all(plan.mean_correction for plan in chosen)

    @property
    def statistics(self) -> dict[int, LayerStatistics]:
        """Layer index -> statistics of that layer's latest sparse prefill; empty before the first."""
        return {index: plan.latest for index, plan in self._plans.items() if plan.latest is not None}

    def __enter__(self) -> SparsePrefill:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


class _State:
    """Of a module that is switched on: by which handles, the latest last, and its config before."""

    def __init__(self, module: nn.Module, config: Any, view: Any) -> None:
        self.config = config
        self.view = view
        self.handles: list[SparsePrefill] = []
        hold(view)
        module.config = view

    def add(self, handle: SparsePrefill, module: nn.Module) -> None:
        self.view._attn_implementation_internal = NAME  # which may have been changed by hand since
        self.handles.append(handle)
        self._show(module)

    def remove(self, handle: SparsePrefill, module: nn.Module) -> bool:
        """Whether the module is still switched on."""
        self.handles.remove(handle)
        if self.handles:
            self._show(module)
            return True
        release(self.view)
        if module.config is self.view:  # which may have been replaced since
            module.config = self.config
        vars(module).pop(PLAN_ATTRIBUTE, None)
        return False

    def _show(self, module: nn.Module) -> None:
        plan = self.handles[-1]._switched[module]
        if plan is not None:
            setattr(module, PLAN_ATTRIBUTE, plan)


_on: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
