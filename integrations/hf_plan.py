"""What each attention layer of a model does, decided when sparse prefill is switched on."""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from flexprefill_fa.masks import DEFAULT_SELECTOR, FlexPrefillConfig, Selector, get_selector
from flexprefill_fa.masks.selector import check_selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import MAX_HEAD_DIM

from .hf_layers import Layout, Part, unwrap
from .hf_ranks import check_ranks

PLAN_ATTRIBUTE = "_sparse_prefill_plan"
AS_ASKED = "as asked"
WHOLE_PROMPT = "it attends to the whole prompt"


@dataclass
class LayerStatistics:
    """What one layer kept in its latest sparse prefill; all `[B, Hq]`.

    Attributes:
        density: kept blocks / causal blocks.
        js_distance: FlexPrefill's Jensen-Shannon distance.
        recall: share of the exact attention probability in kept blocks, None unless asked for.
        kept_blocks: number of kept blocks.
    """

    density: Tensor
    js_distance: Tensor
    recall: Tensor | None
    kept_blocks: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class SparseCall:
    """What one layer's sparse prefill selected, and what it selected from.

    Attributes:
        layer: the layer's index.
        selection: the blocks it computes.
        query: `[B, Hq, q_len, D]`. key: `[B, Hkv, kv_len, D]`. Positions applied, as the attention gets them.
        scale: of the scores.
        softcap: what the scaled scores are capped to, None for no cap.
    """

    layer: int
    selection: BlockSelection
    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None


class LayerPlan:
    """What one attention layer does: set on the module, read by the attention function.

    Args:
        config: its selector; None: dense.
        min_prompt_tokens: prompts of fewer tokens run dense.
        statistics: None, "density" or "recall".
        mean_correction: whether dropped blocks count, and by which means.
        insists: whether a call that cannot have the mean correction is refused; otherwise it goes without.
        window: of the layer, in tokens; for models that leave it to the mask.
        graph: "auto" to capture and replay prefills that come again.

    Attributes:
        latest: statistics of the latest sparse prefill.
        observer: is shown every sparse prefill of the layer, None for nobody.
    """

    def __init__(
        self,
        config: Selector | None,
        min_prompt_tokens: int,
        statistics: str | None,
        mean_correction: MeanCorrection = False,
        window: int | None = None,
        insists: bool = True,
        graph: str = "never",
    ) -> None:
        self.config = config
        self.settings = None if config is None else config.settings()
        self.min_prompt_tokens = min_prompt_tokens
        self.statistics = statistics
        self.mean_correction: MeanCorrection = mean_correction
        self.window = window
        self.insists = insists
        self.graph = graph
        self.latest: LayerStatistics | None = None
        self.observer: Callable[[SparseCall], None] | None = None

    def __reduce__(self) -> Any:
        # A copy of a module is not switched on, see `enable_sparse_prefill`: it has None in the place of a plan.
        return type(None), ()


def default_plan() -> LayerPlan:
    """For a model that asks for the implementation by name alone, which is that of FlexPrefill."""
    config = FlexPrefillConfig()
    return LayerPlan(config, config.dense_tokens + 1, None)


@dataclass(frozen=True)
class LayerDescription:
    """What a layer does in a prompt of at least `min_prompt_tokens` tokens.

    Attributes:
        layer: its index; None for a part that is no causal language layer, such as a vision tower.
        runs: "sparse", "window" (the blocks of its sliding window, exactly), "dense", or "own" for such a part, which
            keeps the attention that it had.
        why: in words.
        config: the selector of a sparse layer.
        min_prompt_tokens: of a sparse layer; shorter prompts are dense.
    """

    layer: int | None
    runs: str
    why: str
    config: Selector | None = None
    min_prompt_tokens: int | None = None


def check_model(model: Any) -> dict[int, nn.Module]:
    """The attention modules of the model's language layers by index, or an error that says why it cannot be served.

    Args:
        model: a transformers model, or a module that holds one, see `unwrap`.
    """
    model = unwrap(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; sparse prefill is for decoder-only models")
    layout = Layout.of(model)
    for host in layout.hosts or (model,):
        if not host._can_set_attn_implementation():
            raise ValueError(
                f"{type(host).__name__} does not use transformers' attention interface, so its attention cannot be "
                "replaced"
            )
    layers: dict[int, nn.Module] = {}
    for module, index in layout.layers.items():
        layers.setdefault(index, module)
    if not layers:
        raise ValueError(f"{name} has no attention layer that sparse prefill knows")
    for module, index in layout.layers.items():
        if not getattr(module, "is_causal", True):
            raise ValueError(f"{name} cannot run sparse prefill: layer {index}: it is not causal")
        if hasattr(module, "prepare_dynamic_mask"):
            raise ValueError(f"{name} cannot run sparse prefill: layer {index}: it computes a mask of its own")
    layers = dict(sorted(layers.items()))
    check_ranks(model, layers)
    return layers


ConfigChoice = Selector | Mapping[int, Selector] | Callable[[int], Selector | None] | None


def configs_of(layers: Mapping[int, nn.Module], config: ConfigChoice, dense_layers: Any) -> dict[int, Any]:
    """The selector of each layer, None for a dense one.

    Raises:
        TypeError, ValueError: for what is not a selector, and for layers that the model does not have.
    """
    if isinstance(dense_layers, (int, str)) or not all(isinstance(layer, int) for layer in dense_layers):
        raise TypeError(f"dense_layers must be layer indices such as (0, 1), got {dense_layers!r}")
    if isinstance(config, Mapping) and not all(isinstance(layer, int) for layer in config):
        raise TypeError(f"config must map layer indices to selector configs, got the keys {list(config)}")
    last = max(layers)
    dense = {layer + last + 1 if layer < 0 else layer for layer in dense_layers}
    named = dense | (set(config) if isinstance(config, Mapping) else set())
    unknown = sorted(named - set(layers))
    if unknown:
        raise ValueError(f"the model's attention layers are {_listed(layers)}, got a setting for layer {unknown[0]}")
    chosen: dict[int, Any] = {}
    for layer in layers:
        if layer in dense:
            chosen[layer] = None
        elif isinstance(config, Mapping):
            chosen[layer] = config.get(layer)
        elif callable(config) and not hasattr(config, "operator"):
            chosen[layer] = config(layer)
        else:
            chosen[layer] = get_selector(DEFAULT_SELECTOR)() if config is None else config
        if chosen[layer] is not None:
            check_selector(chosen[layer])
    return chosen


def _listed(layers: Mapping[int, nn.Module]) -> str:
    indices = sorted(layers)
    whole = indices == list(range(indices[0], indices[-1] + 1))
    return f"{indices[0]} to {indices[-1]}" if whole and len(indices) > 1 else ", ".join(map(str, indices))


def layer_kind(model: PreTrainedModel, index: int) -> str | None:
    """What the model's config calls a layer, such as "sliding_attention"; None where it does not tell layers apart."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    return kinds[index] if index < len(kinds) else None


def layer_window(model: PreTrainedModel, index: int, module: nn.Module) -> int | None:
    """The layer's sliding window in tokens, or None."""
    kind = layer_kind(model, index)
    if kind is not None and kind != "sliding_attention":  # some modules carry a window that they do not use
        return None
    shared = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    return getattr(module, "sliding_window", shared) or None


def layer_softcap(model: PreTrainedModel, module: nn.Module) -> float | None:
    """What the layer caps its scores at, or None."""
    text = model.config.get_text_config(decoder=True)
    return getattr(module, "attn_logit_softcapping", None) or getattr(text, "attn_logit_softcapping", None)


def has_sinks(module: nn.Module) -> bool:
    """Whether the layer has attention sinks."""
    return getattr(module, "sinks", None) is not None


def describe(model: PreTrainedModel, index: int, module: nn.Module, plan: LayerPlan) -> LayerDescription:
    """What one layer does in a long prompt, and why."""
    from .hf_switch import NAME

    own: Any = getattr(module, "config", model.config)
    if getattr(module, PLAN_ATTRIBUTE, None) is not None and own._attn_implementation != NAME:
        return LayerDescription(index, "dense", f"its attention was set to {own._attn_implementation!r} since")
    text = model.config.get_text_config(decoder=True)
    extras = []
    softcap = layer_softcap(model, module)
    if softcap is not None:
        extras.append(f"scores capped at {softcap:g} by a score_mod")
    sinks = has_sinks(module)
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    if sinks and device != "cpu":
        extras.append("attention sinks by the log-sum-exp")
    kind = layer_kind(model, index)
    head_dim = getattr(module, "head_dim", None)
    window = layer_window(model, index, module)
    if sinks and device == "cpu":
        return LayerDescription(
            index, "dense", "attention sinks need a log-sum-exp, which the CPU kernel does not give"
        )
    if kind == "chunked_attention" or (kind is None and getattr(text, "attention_chunk_size", None)):
        return LayerDescription(index, "dense", f"it attends in chunks of {text.attention_chunk_size} tokens")
    if isinstance(head_dim, int) and head_dim > MAX_HEAD_DIM:
        return LayerDescription(index, "dense", f"its head dim of {head_dim} is above {MAX_HEAD_DIM}")
    if window is not None:
        return LayerDescription(index, "window", "; ".join([f"a sliding window of {window} tokens", *extras]))
    if plan.config is None:
        return LayerDescription(index, "dense", "; ".join([AS_ASKED, *extras]))
    if plan.mean_correction:
        extras.append("dropped blocks count by their " + ("means" if plan.mean_correction is True else "tilted means"))
    why = "; ".join([WHOLE_PROMPT, *extras])
    return LayerDescription(index, "sparse", why, plan.config, plan.min_prompt_tokens)


def describe_part(part: Part) -> LayerDescription:
    """What a part does that is never sparse."""
    own = "its own attention" if part.implementation is None else f"its own attention, {part.implementation!r}"
    return LayerDescription(None, "own", f"{part.name} ({part.kind}) keeps {own}")
