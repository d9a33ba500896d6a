"""Sparse prefill in Hugging Face transformers, through its public attention interface.

Importing this module registers the attention implementation "flexprefill". Prompts run sparse from
`min_prompt_tokens` on; decode steps, short prompts and short verification chunks are dense. Nothing is patched.

    model = AutoModelForCausalLM.from_pretrained(path)
    with enable_sparse_prefill(model):  # or with another selector: (model, FlexPrefillConfig(gamma=0.9))
        model.generate(**inputs)

`from_pretrained(path, attn_implementation="flexprefill")` by itself is FlexPrefill with its default settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.validation import check_correction_kind, check_graph, check_integer, corrects_means

from .hf_attention import flexprefill_attention
from .hf_compile import CompiledPrefill, compile_prefill
from .hf_layers import Layout, unwrap
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
    describe_part,
    has_sinks,
    layer_softcap,
    layer_window,
)
from .hf_statistics import PrefillStatistics, is_flexprefill
from .hf_switch import NAME, SparsePrefill

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
    "default_correction",
    "describe_sparse_prefill",
    "enable_sparse_prefill",
    "observe_sparse_prefill",
]

SHORT_PROMPT = 4096
"""Prompts of at most so many tokens run dense where neither a selector nor a length is chosen: on an H100 they gain
nothing, neither with a model of 8B parameters nor with a small one, which waits for the CPU (docs/benchmarks.md)."""

AttentionInterface.register(NAME, flexprefill_attention)
AttentionMaskInterface.register(NAME, flexprefill_mask)


def enable_sparse_prefill(
    model: nn.Module,
    config: ConfigChoice = None,
    *,
    dense_layers: Sequence[int] = (),
    min_prompt_tokens: int | None = None,
    mean_correction: MeanCorrection | Literal["auto"] | None = None,
    graph: Literal["never", "auto"] = "never",
    statistics: str | None = None,
) -> SparsePrefill:
    """Switch a model's prefill to sparse attention.

    Layers with a sliding window compute exactly its blocks; `describe_sparse_prefill` lists what each layer does. Parts
    that are no language layers (vision and audio towers, cross attention) keep their attention.

    It is the model's modules that are switched, and nothing that they share with other models: another model with the
    same config object stays as it is, and a copy or a pickle of a sparse model is what the model was before.

    Args:
        model: a decoder-only transformers model whose attention goes through the attention interface, or a module that
            holds exactly one: a PEFT, a `torch.compile`d, a DataParallel model.
        config: the selector and its settings, default `PeakPrefillConfig()`; or one for each layer: a mapping from
            layer index, or a function of it. Layers without one (None) are dense.
        dense_layers: layers that stay dense, by index; negative ones count from the last.
        min_prompt_tokens: prompts (cached prefix included) of fewer tokens run dense; default: the longest prompt of
            which the selector keeps every block, plus 1; without a config at least 4,097.
        mean_correction: let dropped blocks count, True or "tilted", see `sparse_prefill_attention`; "auto": tilted,
            where a layer, a prompt and the device can have it. Default: "auto" without a config, False with one.
        graph: "auto" to capture sparse prefills that come again as CUDA graphs, as in `sparse_prefill_attention`;
            layers that are alike share one for each length, and `release_graphs()` drops them. Worth its memory where
            lengths come again and the CPU's launches take longer than the GPU's work: small models and prompts up to
            16,384 tokens. A compiled model goes without.
        statistics: None, "density" to keep each layer's density, kept blocks and JS distance, or "recall" to also
            compute the recall (exact attention: slow).

    Returns:
        A handle: a context manager that restores the model on exit, with `disable()` and `statistics`.

    Raises:
        TypeError, ValueError: for a model or a setting that cannot be served; the model is then unchanged.
    """
    if min_prompt_tokens is not None:
        check_integer("min_prompt_tokens", min_prompt_tokens, 1)
    if mean_correction is None:
        mean_correction = "auto" if config is None else False
    if mean_correction != "auto":
        check_correction_kind(mean_correction)
    check_graph(graph)
    if statistics not in (None, "density", "recall"):
        raise ValueError(f"statistics must be None, 'density' or 'recall', got {statistics!r}")
    inner = unwrap(model)
    layers = check_model(inner)
    plans: dict[int, LayerPlan] = {}
    for index, chosen in configs_of(layers, config, dense_layers).items():
        least = min_prompt_tokens
        if least is None:
            least = 1 if chosen is None else chosen.dense_tokens + 1
            least = max(least, SHORT_PROMPT + 1) if config is None else least
        window = layer_window(inner, index, layers[index])
        correction = "tilted" if mean_correction == "auto" else mean_correction
        plans[index] = plan = LayerPlan(
            chosen, least, statistics, correction, window, insists=mean_correction != "auto", graph=graph
        )
        if plan.mean_correction and (why := _not_corrected(inner, index, layers[index], plan)):
            if plan.insists:
                raise ValueError(f"mean_correction cannot be combined with what layer {index} needs: {why}")
            plan.mean_correction = False
    return SparsePrefill(inner, plans)


def _not_corrected(model: PreTrainedModel, index: int, module: nn.Module, plan: LayerPlan) -> str | None:
    """What keeps a sparse layer from mean correction."""
    if plan.config is None or plan.window is not None:
        return None
    layer = describe(model, index, module, plan)
    if has_sinks(module) or (layer.runs == "sparse" and layer_softcap(model, module) is not None):
        return layer.why
    device = next(module.parameters()).device
    return None if corrects_means(device) else f"the CPU, where it needs torch 2.13, got torch {torch.__version__}"


def default_correction(model: nn.Module) -> Literal["tilted", False]:
    """What goes with PeakPrefill where nothing is chosen, for the whole model.

    Returns:
        "tilted" if every layer that runs sparse can have it.

    Raises:
        TypeError, ValueError: for a model that cannot be served.
    """
    with enable_sparse_prefill(model) as handle:
        return "tilted" if handle.corrected else False


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
            {
                index: getattr(config, "tau", None) if is_flexprefill(config.name) else None
                for index, (_, config) in sparse.items()
            },
            {index: config.name for index, (_, config) in sparse.items()},
        )

    def __enter__(self) -> StatisticsCollection:
        for plan in self._plans.values():
            plan.statistics, plan.latest = self._kind, None
        return self

    def __exit__(self, *exception: object) -> None:
        for index, plan in self._plans.items():
            plan.statistics = self._before[index]


def collect_statistics(model: nn.Module, *, recall: bool = False) -> StatisticsCollection:
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


def _plans_of(model: nn.Module, caller: str) -> dict[int, LayerPlan]:
    plans = {index: getattr(module, PLAN_ATTRIBUTE, None) for index, module in check_model(model).items()}
    found = {index: plan for index, plan in plans.items() if isinstance(plan, LayerPlan)}
    if not found:
        raise ValueError(f"{caller} is for sparse prefill: call enable_sparse_prefill(model) first")
    return found


@contextmanager
def observe_sparse_prefill(model: nn.Module, observer: Callable[[SparseCall], None]) -> Iterator[None]:
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


def describe_sparse_prefill(model: nn.Module) -> list[LayerDescription]:
    """What each attention layer does in a long prompt, and why.

    Args:
        model: with or without `enable_sparse_prefill`; without, for `attn_implementation="flexprefill"`, which is
            FlexPrefill with its default settings.

    Returns:
        One description for each language layer, in order, then one for each part that keeps its own attention.

    Raises:
        TypeError, ValueError: for a model that cannot be served.
    """
    inner = unwrap(model)
    plan = default_plan()
    layers = [
        describe(inner, index, module, getattr(module, PLAN_ATTRIBUTE, None) or plan)
        for index, module in check_model(inner).items()
    ]
    return layers + [describe_part(part) for part in Layout.of(inner).parts]
