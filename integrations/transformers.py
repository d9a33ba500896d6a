"""Sparse prefill in Hugging Face transformers, through its public attention interface.

Importing this module registers the attention implementation "flexprefill". Prompts run sparse from
`min_prompt_tokens` on; decode steps, short prompts and short verification chunks are dense. Nothing is patched.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flexprefill")   # default settings
    with enable_sparse_prefill(model, FlexPrefillConfig(gamma=0.9)):
        model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexprefill_fa.attention import dense_attention, run_compiled
from flexprefill_fa.backends import kernel_options, resolve_backend
from flexprefill_fa.block_mask import needs_position
from flexprefill_fa.grid import Grid, real_ranges, visible_blocks
from flexprefill_fa.masks import FlexPrefillConfig, SelectorConfig
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import check_integer

NAME = "flexprefill"
MINIMUM_VERSION = (5, 17)
# Fewer queries than this are a decode step or a verification chunk: dense. One constant, known to mask and attention.
MIN_QUERY_TOKENS = 128

try:
    import transformers
except ImportError as error:
    raise ImportError("the Hugging Face integration needs transformers: pip install 'flexprefill-fa[hf]'") from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_VERSION:
    raise ImportError(
        f"the Hugging Face integration needs transformers >= {'.'.join(map(str, MINIMUM_VERSION))}, "
        f"got {transformers.__version__}"
    )

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import causal_mask_function, sdpa_mask  # noqa: E402


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


class _PackedPrompt:
    """Stands in for the attention mask when several sequences share one row, separated by their position ids."""


_PACKED = _PackedPrompt()


class _LayerPlan:
    """What one attention layer does: set on the module, read by the attention function."""

    def __init__(self, config: SelectorConfig, min_prompt_tokens: int, statistics: str | None) -> None:
        self.config = config
        self.settings = config.settings()
        self.min_prompt_tokens = min_prompt_tokens
        self.statistics = statistics
        self.latest: LayerStatistics | None = None


def _default_plan() -> _LayerPlan:
    config = FlexPrefillConfig()
    return _LayerPlan(config, config.dense_tokens + 1, None)


_DEFAULT_PLAN = _default_plan()
_PLAN = "_sparse_prefill_plan"


def _unsupported(
    sliding_window: int | None, softcap: float | None, s_aux: Tensor | None, position_bias: Tensor | None, cache: Any
) -> str | None:
    """Why a layer's attention cannot be served, or None."""
    if sliding_window is not None:
        return f"it attends to a sliding window ({sliding_window} tokens)"
    if softcap is not None:
        return f"it caps its scores (softcap {softcap})"
    if s_aux is not None:
        return "it has attention sinks (s_aux)"
    if position_bias is not None:
        return "it adds a position bias to its scores"
    if cache is not None:
        return "it uses a paged cache"
    return None


def _padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(first real key, number of real keys), int32 `[B]` each, of a padding mask `[B, kv_len]`."""
    return mask.to(torch.int32).argmax(-1).to(torch.int32), mask.sum(-1, dtype=torch.int32)


@torch.library.custom_op("flexprefill_fa::sequence_ids", mutates_args=())
def _sequence_ids(position_ids: Tensor, batch: int) -> Tensor:
    """int32 `[B, n]`: which packed sequence each token belongs to; a new one starts where positions do not go up by 1.

    An operator, because FlexAttention wants the tensors that a mask_mod captures in memory.
    """
    ids = position_ids.expand(batch, -1)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids.diff(dim=-1) != 1
    return new.cumsum(-1).to(torch.int32)


@_sequence_ids.register_fake
def _(position_ids: Tensor, batch: int) -> Tensor:
    return position_ids.new_empty((batch, position_ids.shape[-1]), dtype=torch.int32)


def _same_sequence(sequence: Tensor) -> Callable[..., Tensor]:
    def same_sequence(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return sequence[b, q_idx] == sequence[b, kv_idx]

    return same_sequence


def _record(
    plan: _LayerPlan,
    lists: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    padding: tuple[Tensor | None, Tensor | None],
    scale: float | None,
) -> None:
    """Keep the statistics of a prefill; stays on the GPU."""
    kv_num_blocks, _, full_kv_num_blocks, _, js_distance = lists
    grid = Grid(query.shape[2], key.shape[2], plan.config.block_size)
    ranges = real_ranges(*padding, query.shape[0], grid.kv_len, query.device)
    causal = visible_blocks(grid, ranges).sum((-2, -1))
    kept = (kv_num_blocks + full_kv_num_blocks).sum(-1)
    recall = None
    if plan.statistics == "recall":
        if torch.compiler.is_compiling():
            raise RuntimeError("statistics='recall' computes exact attention and needs an uncompiled model")
        selection = BlockSelection(*lists, grid.q_len, grid.kv_len, grid.block_size, *padding)
        recall = selection.recall(query, key, scale=scale)
    plan.latest = LayerStatistics(kept / causal.clamp(min=1)[:, None], js_distance, recall, kept)


def flexprefill_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query `[B, Hq, q, D]`, key and value `[B, Hkv, kv, D]`.

    Returns:
        `[B, q, Hq, D]` and None (there are no attention weights).

    Raises:
        ValueError: for a layer or a call that cannot be served, with what to do.
    """
    layer = getattr(module, "layer_idx", None)
    problem = _unsupported(sliding_window, softcap, s_aux, position_bias, cache)
    if problem is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        problem = "it is not causal"
    if problem is None and kwargs.get("output_attentions"):
        problem = "output_attentions=True needs the attention weights, which are never computed"
    if problem is not None:
        raise ValueError(
            f"layer {layer} ({type(module).__name__}) cannot run sparse prefill: {problem}. "
            "Use attn_implementation='sdpa' or 'eager' for this model."
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len < MIN_QUERY_TOKENS:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            f"layer {layer}: sparse prefill takes a padding mask [batch, keys] or none, got an attention mask of shape "
            f"{tuple(attention_mask.shape)}; use attn_implementation='sdpa' for custom masks"
        )
    if dropout:
        raise ValueError(f"layer {layer}: sparse prefill is for inference, got dropout {dropout}; call model.eval()")

    plan: _LayerPlan = getattr(module, _PLAN, None) or _DEFAULT_PLAN
    starts, lengths = (None, None) if not isinstance(attention_mask, Tensor) else _padding(attention_mask)
    mask_mod = None
    if isinstance(attention_mask, _PackedPrompt):
        if position_ids is None:
            raise ValueError(f"layer {layer}: packed sequences need the model to pass position_ids to its attention")
        mask_mod = _same_sequence(_sequence_ids(position_ids, query.shape[0]))
    if kv_len < plan.min_prompt_tokens:
        out = dense_attention(query, key, value, starts, lengths, scaling, mask_mod)
        return out.transpose(1, 2).contiguous(), None
    backend = resolve_backend(
        "auto",
        query,
        plan.config.block_size,
        has_mask_mod=mask_mod is not None,
        position_in_graph=torch.compiler.is_compiling() and needs_position(query, key, starts, lengths),
    )
    out, lists = run_compiled(
        query,
        key,
        value,
        starts,
        lengths,
        plan.config,
        plan.settings,
        scale=scaling,
        mask_mod=mask_mod,
        score_mod=None,
        options=kernel_options(backend, query, plan.config.block_size),
    )
    if plan.statistics is not None:
        _record(plan, lists, query, key, (starts, lengths), scaling)
    return out.transpose(1, 2).contiguous(), None


def flexprefill_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Any:
    """The mask function that transformers calls; never an n x n mask for a long prompt.

    Returns:
        None for a causal prompt without padding, the padding mask `[B, kv]` where there is one, a mark for packed
        sequences, and what SDPA wants for decode steps and short chunks.
    """
    if q_length < MIN_QUERY_TOKENS:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # pyright: ignore[reportArgumentType]  # a tensor with static caches
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        )
    if isinstance(q_offset, Tensor):
        raise ValueError(
            "sparse prefill does not serve static caches yet: use a dynamic cache (cache_implementation=None)"
        )
    if mask_function is not causal_mask_function:
        packed = attention_mask is None and q_length == kv_length and not use_vmap
        if not packed:
            raise ValueError(
                "sparse prefill serves causal masks, padding and packed sequences; this model asks for another mask: "
                "use attn_implementation='sdpa'"
            )
        return _PACKED
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if torch.compiler.is_compiling():
        return mask
    if mask.all():
        return None
    # Real tokens must be one run: from the first to the last there is no gap.
    if not torch.equal(mask.int().diff(dim=-1).abs().sum(-1) + mask[:, 0].int() + mask[:, -1].int(), _two(mask)):
        raise ValueError("sparse prefill needs each row's real tokens to be one run in attention_mask, got gaps")
    return mask


def _two(mask: Tensor) -> Tensor:
    return torch.full((mask.shape[0],), 2, dtype=torch.int64, device=mask.device)


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
    softcap = getattr(config, "attn_logit_softcapping", None)
    for index, module in layers.items():
        problem = _unsupported(
            getattr(module, "sliding_window", None), softcap, getattr(module, "sinks", None), None, None
        )
        if problem is None and not module.is_causal:
            problem = "it is not causal"
        if problem is not None:
            raise ValueError(f"{name} cannot run sparse prefill: layer {index}: {problem}")
    return layers


class SparsePrefill:
    """Sparse prefill switched on for a model; a context manager, or call `disable()`."""

    def __init__(self, model: PreTrainedModel, layers: dict[int, nn.Module], plans: dict[int, _LayerPlan]) -> None:
        self._model = model
        self._layers = layers
        self._plans = plans
        self._before = {index: getattr(module, _PLAN, None) for index, module in layers.items()}
        self._implementation: str = model.config._attn_implementation or "eager"
        self._active = False

    def _enable(self) -> None:
        self._model.set_attn_implementation(NAME)
        for index, module in self._layers.items():
            setattr(module, _PLAN, self._plans[index])
        self._active = True

    def disable(self) -> None:
        """Give the model back its attention implementation and settings of before; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        for index, module in self._layers.items():
            if self._before[index] is None:
                delattr(module, _PLAN)
            else:
                setattr(module, _PLAN, self._before[index])
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
    if not callable(getattr(config, "operator", None)):
        raise TypeError(f"config must be a selector config such as FlexPrefillConfig, got {type(config).__name__}")
    if min_prompt_tokens is None:
        min_prompt_tokens = config.dense_tokens + 1
    check_integer("min_prompt_tokens", min_prompt_tokens, 1)
    if statistics not in (None, "density", "recall"):
        raise ValueError(f"statistics must be None, 'density' or 'recall', got {statistics!r}")
    layers = _check_model(model)
    plans = {index: _LayerPlan(config, min_prompt_tokens, statistics) for index in layers}
    handle = SparsePrefill(model, layers, plans)
    handle._enable()
    return handle
