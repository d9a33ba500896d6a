"""Sparse prefill in Hugging Face transformers, through its public attention interface.

Importing this module registers the attention implementation "flexprefill". Prompts run sparse from
`min_prompt_tokens` on; decode steps, short prompts and short verification chunks are dense. Nothing is patched.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flexprefill")   # default settings
    with enable_sparse_prefill(model, FlexPrefillConfig(gamma=0.9)):
        model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

from torch import nn

from flexprefill_fa.validation import check_integer

from .hf_attention import flexprefill_attention
from .hf_compile import CompiledPrefill, compile_prefill
from .hf_mask import flexprefill_mask
from .hf_plan import (
    PLAN_ATTRIBUTE,
    ConfigChoice,
    LayerDescription,
    LayerPlan,
    LayerStatistics,
    SparseCall,
    check_model,
    configs_of,
    default_plan,
    describe,
    has_sinks,
    layer_softcap,
    layer_window,
)
from .hf_statistics import PrefillStatistics

# hf_version says which extra is missing where transformers is not installed, so it comes first.
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # isort: skip

__all__ = [
    "NAME",
    "CompiledPrefill",
    "LayerDescription",
    "LayerStatistics",
    "PrefillStatistics",
    "SparseCall",
    "SparsePrefill",
    "StatisticsCollection",
    "collect_statistics",
    "compile_prefill",
    "describe_sparse_prefill",
    "enable_sparse_prefill",
    "observe_sparse_prefill",
]

NAME = "flexprefill"

AttentionInterface.register(NAME, flexprefill_attention)
AttentionMaskInterface.register(NAME, flexprefill_mask)


class SparsePrefill:
    """Sparse prefill switched on for a model; a context manager, or call `disable()`.

    Several may be on for one model: the latest counts, and they may be switched off in any order. The model is held
    weakly: being sparse keeps no model alive.
    """

    _stacks: ClassVar[WeakKeyDictionary[PreTrainedModel, list[SparsePrefill]]] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, layers: dict[int, nn.Module], plans: dict[int, LayerPlan]) -> None:
        self._model = ref(model)
        self._layers = layers
        self._plans = plans
        below = self._stacks.get(model)
        implementation = below[0]._implementation if below else model.config._attn_implementation
        self._implementation: str = implementation or "eager"  # of the model without any

    @classmethod
    def all_of(cls, model: PreTrainedModel) -> list[SparsePrefill]:
        """Those that are on for a model, the latest last."""
        return list(cls._stacks.get(model, ()))

    def _enable(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation(NAME)
        self._stacks.setdefault(model, []).append(self)
        self._apply()

    def _apply(self) -> None:
        for index, module in self._layers.items():
            setattr(module, PLAN_ATTRIBUTE, self._plans[index])

    def disable(self) -> None:
        """Give the model back what it had without this; a second call does nothing."""
        model = self._model()
        stack = self._stacks.get(model, []) if model is not None else []
        if model is None or self not in stack:
            return
        stack.remove(self)
        if stack:
            stack[-1]._apply()
            return
        del self._stacks[model]
        for module in self._layers.values():
            delattr(module, PLAN_ATTRIBUTE)
        model.set_attn_implementation(self._implementation)

    @property
    def statistics(self) -> dict[int, LayerStatistics]:
        """Layer index -> statistics of that layer's latest sparse prefill; empty before the first."""
        return {index: plan.latest for index, plan in self._plans.items() if plan.latest is not None}

    def __enter__(self) -> SparsePrefill:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def enable_sparse_prefill(
    model: PreTrainedModel,
    config: ConfigChoice = None,
    *,
    dense_layers: Sequence[int] = (),
    min_prompt_tokens: int | None = None,
    mean_correction: bool = False,
    statistics: str | None = None,
) -> SparsePrefill:
    """Switch a model's prefill to sparse attention.

    Layers with a sliding window compute exactly its blocks; `describe_sparse_prefill` lists what each layer does.

    Args:
        model: a decoder-only transformers model whose attention goes through the attention interface.
        config: the selector and its settings, default `FlexPrefillConfig()`; or one for each layer: a mapping from
            layer index, or a function of it. Layers without one (None) are dense.
        dense_layers: layers that stay dense, by index; negative ones count from the last.
        min_prompt_tokens: prompts (cached prefix included) of fewer tokens run dense; default: the longest prompt of
            which the selector keeps every block, plus 1.
        mean_correction: let dropped blocks count by their means, see `sparse_prefill_attention`.
        statistics: None, "density" to keep each layer's density, kept blocks and JS distance, or "recall" to also
            compute the recall (exact attention: slow).

    Returns:
        A handle: a context manager that restores the model on exit, with `disable()` and `statistics`.

    Raises:
        TypeError, ValueError: for a model or a setting that cannot be served; the model is then unchanged.
    """
    if min_prompt_tokens is not None:
        check_integer("min_prompt_tokens", min_prompt_tokens, 1)
    if not isinstance(mean_correction, bool):
        raise TypeError(f"mean_correction must be True or False, got {type(mean_correction).__name__}")
    if statistics not in (None, "density", "recall"):
        raise ValueError(f"statistics must be None, 'density' or 'recall', got {statistics!r}")
    layers = check_model(model)
    plans: dict[int, LayerPlan] = {}
    for index, chosen in configs_of(layers, config, dense_layers).items():
        least = min_prompt_tokens
        if least is None:
            least = 1 if chosen is None else chosen.dense_tokens + 1
        window = layer_window(model, index, layers[index])
        plans[index] = LayerPlan(chosen, least, statistics, mean_correction, window)
    if mean_correction:
        _check_mean_correction(model, layers, plans)
    handle = SparsePrefill(model, layers, plans)
    handle._enable(model)
    return handle


def _check_mean_correction(model: PreTrainedModel, layers: dict[int, nn.Module], plans: dict[int, LayerPlan]) -> None:
    for index, module in layers.items():
        if plans[index].config is None or layer_window(model, index, module) is not None:
            continue
        layer = describe(model, index, module, plans[index])
        if has_sinks(module) or (layer.runs == "sparse" and layer_softcap(model, module) is not None):
            raise ValueError(f"mean_correction cannot be combined with what layer {index} needs: {layer.why}")


class StatisticsCollection:
    """Statistics of the prefills inside a context, see `collect_statistics`."""

    def __init__(self, plans: dict[int, LayerPlan], recall: bool) -> None:
        self._plans = plans
        self._kind = "recall" if recall else "density"
        self._before = {index: plan.statistics for index, plan in plans.items()}

    def latest(self) -> PrefillStatistics:
        """Of the latest prefill, read back from the GPU now.

        Raises:
            ValueError: if none has run.
        """
        sparse = {index: (plan, plan.config) for index, plan in self._plans.items() if plan.config is not None}
        return PrefillStatistics.gather(
            {index: plan.latest for index, (plan, _) in sparse.items() if plan.latest is not None},
            {index: getattr(config, "tau", None) for index, (_, config) in sparse.items()},
            {index: config.name for index, (_, config) in sparse.items()},
        )

    def __enter__(self) -> StatisticsCollection:
        for plan in self._plans.values():
            plan.statistics, plan.latest = self._kind, None
        return self

    def __exit__(self, *exception: object) -> None:
        for index, plan in self._plans.items():
            plan.statistics = self._before[index]


def collect_statistics(model: PreTrainedModel, *, recall: bool = False) -> StatisticsCollection:
    """What each layer and head keeps in the prefills of a context, while sparse prefill is on.

        with collect_statistics(model) as found:
            model.generate(**inputs)
        found.latest().save_heat_map("density.png")

    Nothing is read back from the GPU before `found.latest()`, whose `table()` and `save_heat_map(path)` show density,
    Jensen-Shannon distance and pattern.

    Args:
        model: with sparse prefill switched on by `enable_sparse_prefill`.
        recall: also measure which share of the exact attention the kept blocks hold (exact attention: slow).

    Raises:
        TypeError, ValueError: for a model that cannot be served, or has no sparse prefill on.
    """
    return StatisticsCollection(_plans_of(model, "collect_statistics"), recall)


def _plans_of(model: PreTrainedModel, caller: str) -> dict[int, LayerPlan]:
    plans = {index: getattr(module, PLAN_ATTRIBUTE, None) for index, module in check_model(model).items()}
    found = {index: plan for index, plan in plans.items() if isinstance(plan, LayerPlan)}
    if not found:
        raise ValueError(f"{caller} is for sparse prefill: call enable_sparse_prefill(model) first")
    return found


@contextmanager
def observe_sparse_prefill(model: PreTrainedModel, observer: Callable[[SparseCall], None]) -> Iterator[None]:
    """Show every sparse prefill of every layer inside a context to a function, while sparse prefill is on.

    The function gets the selection and the tensors that it was made from, just after the layer computed its attention;
    nothing is kept for it. A prompt in chunks gives one call for each chunk. Needs an uncompiled model.

    Args:
        model: with sparse prefill switched on by `enable_sparse_prefill`.
        observer: called with one `SparseCall`; what it raises stops the prefill.

    Raises:
        TypeError, ValueError: for a model that cannot be served, or has no sparse prefill on.
    """
    plans = _plans_of(model, "observe_sparse_prefill")
    before = {index: plan.observer for index, plan in plans.items()}
    for plan in plans.values():
        plan.observer = observer
    try:
        yield
    finally:
        for index, plan in plans.items():
            plan.observer = before[index]


def describe_sparse_prefill(model: PreTrainedModel) -> list[LayerDescription]:
    """What each attention layer does in a long prompt, and why.

    Args:
        model: with or without `enable_sparse_prefill`; without, for `attn_implementation="flexprefill"` and its default
            settings.

    Returns:
        One description for each layer, in order.

    Raises:
        TypeError, ValueError: for a model that cannot be served.
    """
    plan = default_plan()
    return [
        describe(model, index, module, getattr(module, PLAN_ATTRIBUTE, None) or plan)
        for index, module in check_model(model).items()
    ]
