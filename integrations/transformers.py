"""Sparse prefill in Hugging Face transformers, through its public attention interface.

Importing this module registers the attention implementation "flexprefill". Prompts run sparse from
`min_prompt_tokens` on; decode steps, short prompts and short verification chunks are dense. Nothing is patched.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flexprefill")   # default settings
    with enable_sparse_prefill(model, FlexPrefillConfig(gamma=0.9)):
        model.generate(**inputs)
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import nn

from flexprefill_fa.masks import FlexPrefillConfig, SelectorConfig
from flexprefill_fa.masks.selector import check_selector
from flexprefill_fa.validation import check_integer

from .hf_attention import (
    PLAN_ATTRIBUTE,
    LayerPlan,
    LayerStatistics,
    flexprefill_attention,
    flexprefill_mask,
    unsupported,
)

# hf_attention says which extra is missing where transformers is not installed, so it comes first.
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # isort: skip

__all__ = ["NAME", "LayerStatistics", "SparsePrefill", "enable_sparse_prefill"]

NAME = "flexprefill"

AttentionInterface.register(NAME, flexprefill_attention)
AttentionMaskInterface.register(NAME, flexprefill_mask)


def _attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The decoder's attention modules by layer index."""
    layers: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "config") and hasattr(module, "is_causal"):
            layers[index] = module
    return dict(sorted(layers.items()))


def _check_model(model: Any) -> dict[int, nn.Module]:
    """The model's attention layers, or an error that says why it cannot run sparse prefill."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; sparse prefill is for decoder-only models")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not use transformers' attention interface, so its attention cannot be replaced")
    layers = _attention_layers(model)
    if not layers:
        raise ValueError(f"{name} has no attention layer that sparse prefill knows")
    if getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"{name} cannot run sparse prefill: it attends in chunks ({config.attention_chunk_size} tokens)"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    # Where all layers share one window, only the config knows it.
    window = None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
    for index, module in layers.items():
        problem = unsupported(
            getattr(module, "sliding_window", window), softcap, getattr(module, "sinks", None), None, None
        )
        if problem is None and not module.is_causal:
            problem = "it is not causal"
        if problem is not None:
            raise ValueError(f"{name} cannot run sparse prefill: layer {index}: {problem}")
    return layers


class SparsePrefill:
    """Sparse prefill switched on for a model; a context manager, or call `disable()`.

    Several may be on for one model: the latest counts, and they may be switched off in any order.
    """

    _stacks: ClassVar[WeakKeyDictionary[PreTrainedModel, list[SparsePrefill]]] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, layers: dict[int, nn.Module], plans: dict[int, LayerPlan]) -> None:
        self._model = model
        self._layers = layers
        self._plans = plans
        below = self._stacks.get(model)
        implementation = below[0]._implementation if below else model.config._attn_implementation
        self._implementation: str = implementation or "eager"  # of the model without any

    def _enable(self) -> None:
        self._model.set_attn_implementation(NAME)
        self._stacks.setdefault(self._model, []).append(self)
        self._apply()

    def _apply(self) -> None:
        for index, module in self._layers.items():
            setattr(module, PLAN_ATTRIBUTE, self._plans[index])

    def disable(self) -> None:
        """Give the model back what it had without this; a second call does nothing."""
        stack = self._stacks.get(self._model, [])
        if self not in stack:
            return
        stack.remove(self)
        if stack:
            stack[-1]._apply()
            return
        del self._stacks[self._model]
        for module in self._layers.values():
            delattr(module, PLAN_ATTRIBUTE)
        self._model.set_attn_implementation(self._implementation)

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
    config: SelectorConfig | None = None,
    *,
    min_prompt_tokens: int | None = None,
    statistics: str | None = None,
) -> SparsePrefill:
    """Switch a model's prefill to sparse attention.

    Args:
        model: a decoder-only transformers model (Llama, Qwen2 and Qwen3 are tested).
        config: the selector and its settings, default `FlexPrefillConfig()`.
        min_prompt_tokens: prompts (cached prefix included) of fewer tokens run dense; default: the longest prompt of
            which the selector keeps every block, plus 1.
        statistics: None, "density" to keep each layer's density, kept blocks and JS distance, or "recall" to also
            compute the recall (exact attention: slow).

    Returns:
        A handle: a context manager that restores the model on exit, with `disable()` and `statistics`.

    Raises:
        TypeError, ValueError: for a model or a setting that cannot be served; the model is then unchanged.
    """
    config = FlexPrefillConfig() if config is None else config
    check_selector(config)
    if min_prompt_tokens is None:
        min_prompt_tokens = config.dense_tokens + 1
    check_integer("min_prompt_tokens", min_prompt_tokens, 1)
    if statistics not in (None, "density", "recall"):
        raise ValueError(f"statistics must be None, 'density' or 'recall', got {statistics!r}")
    layers = _check_model(model)
    plans = {index: LayerPlan(config, min_prompt_tokens, statistics) for index in layers}
    handle = SparsePrefill(model, layers, plans)
    handle._enable()
    return handle
