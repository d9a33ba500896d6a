"""The mask function that transformers calls for each kind of layer; never an n x n mask for a long prompt.

It hands on only what the attention function needs to know of a prompt: padding, packing, how many keys hold tokens, and
that there is a sliding window, which not every layer tells its attention function.
"""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from flexprefill_fa.dense import MAX_DENSE_MASK_TOKENS

from .hf_ranks import check_config

# A decode step or a verification chunk has fewer queries than this: dense, by the masks of SDPA.
MIN_QUERY_TOKENS = 128


@dataclass(frozen=True)
class PromptMask:
    """What a prompt of at least `MIN_QUERY_TOKENS` queries sees besides the causal rule.

    Attributes:
        padding: bool `[B, keys]`, which keys are real; None: all of them.
        packed: several sequences share a row, told apart by their position ids.
        keys: the first so many keys of the layer hold tokens, the rest of a static cache is empty; None: all do.
        windowed: the layer has a sliding window, whether or not it tells the attention function so.
    """

    padding: Tensor | None = None
    packed: bool = False
    keys: int | None = None
    windowed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether queries see no less than the causal rule lets them."""
        return self.padding is None and not self.packed and not self.windowed

    def __getitem__(self, index: Any) -> PromptMask:
        """Of fewer queries, as models cut their masks where layers see only the last ones: the same keys."""
        return self

    @classmethod
    def of(cls, mask: Any) -> PromptMask | None:
        """What a mask of `flexprefill_mask` says; None for one that SDPA would take."""
        if mask is None:
            return cls()
        if isinstance(mask, PromptMask):
            return mask
        if mask.dtype not in (torch.uint8, torch.int8):
            return None
        padding = mask[:, 0, 0].bool() if mask.shape[2] else None
        return cls(padding, keys=mask.shape[3] or None, windowed=mask.dtype == torch.int8)

    def as_tensor(self, batch: int, keys: int, device: Any) -> Any:
        """In the form of the four-dimensional masks that `generate` copies and models hand on.

        uint8 or, with a window, int8, which no other mask is: `[B, 1, 1, keys]` of the padding, `[B, 1, 0, keys]`
        without any, `[B, 1, 0, 0]` for a plain causal prompt. None would do for that one, but a model that computes
        with its mask would go on without the causal rule; it fails on this. Packed sequences come only where nothing
        looks at the mask.
        """
        if self.packed:
            return self
        dtype = torch.int8 if self.windowed else torch.uint8
        if self.padding is not None:
            return self.padding.to(dtype)[:, None, None]
        shape = (batch, 1, 0, 0 if self.keys is None else keys)
        return torch.empty(shape, dtype=dtype, device=device)


_INTERSECTION = and_masks(causal_mask_function).__code__
_UNION = or_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1, device="cpu")).__code__
_BLOCKS = blockwise_overlay(torch.zeros(1, 1, device="cpu")).__code__


def _without_empty_blocks(mask_function: Callable) -> Callable:
    """A mask function without the blocks that see themselves both ways, where no token is in one.

    The processors of some image models ask for them in every prompt, with images or not. Read back from the GPU.
    """
    if mask_function.__code__ not in (_UNION, _INTERSECTION):
        return mask_function
    masks = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    if mask_function.__code__ is _UNION:
        kept = [mask for mask in masks if mask.__code__ is not _BLOCKS or _has_blocks(mask)]
        return kept[0] if len(kept) == 1 else mask_function
    simpler = [_without_empty_blocks(mask) for mask in masks]
    return mask_function if all(map(operator.is_, simpler, masks)) else and_masks(*simpler)


def _has_blocks(mask: Callable) -> bool:
    return bool((inspect.getclosurevars(mask).nonlocals["block_sequence_ids"] >= 0).any())


def _is_causal_or_window(mask_function: Callable) -> bool:
    if mask_function.__code__ is _INTERSECTION:
        return all(map(_is_causal_or_window, inspect.getclosurevars(mask_function).nonlocals["mask_functions"]))
    return mask_function is causal_mask_function or mask_function.__code__ is _WINDOW


def _contains(function: Callable, code: Any) -> bool:
    """Whether a mask function is, or is composed of, one with this code."""
    if function.__code__ is code:
        return True
    found: list[Callable] = []
    for cell in function.__closure__ or ():
        inside = cell.cell_contents
        found += [item for item in (inside if isinstance(inside, tuple) else (inside,)) if hasattr(item, "__code__")]
    return any(_contains(item, code) for item in found)


def _is_other(
    mask_function: Callable, attention_mask: Tensor | None, use_vmap: bool, arguments: dict[str, Any]
) -> bool:
    """Whether a mask is another one than causal, a sliding window, packed sequences, or several of these at once."""
    if mask_function is causal_mask_function:
        return False
    window = arguments.get("local_size")
    if use_vmap or (window is not None and window == getattr(arguments.get("config"), "attention_chunk_size", None)):
        return True
    # Unions (images that see themselves both ways) carry another function's code. A traced function shows none, but
    # with a padding mask nothing else asks that the mask be made in any case.
    if torch.compiler.is_dynamo_compiling():
        return attention_mask is not None and arguments.get("allow_is_causal_skip") is False
    return mask_function.__code__ is not _INTERSECTION or _contains(mask_function, _UNION)


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
    """The mask function that transformers calls.

    Returns:
        What `PromptMask.of` reads; for decode steps, short chunks and masks that sparse prefill does not serve, what
        SDPA wants.

    Raises:
        ValueError: for rows whose real tokens have gaps (read back from the GPU once per forward pass; a compiled model
            is not checked), for a static cache in a compiled prefill, for prompts beyond `MAX_DENSE_MASK_TOKENS`
            with a mask that is not served, and for a number of ranks that does not divide the heads (not in a compiled
            model).
    """
    if not torch.compiler.is_dynamo_compiling():
        check_config(kwargs.get("config"))

    def square_mask() -> Any:
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

    if q_length < MIN_QUERY_TOKENS:
        if q_length > 1 and getattr(kwargs.get("config"), "num_kv_shared_layers", 0):
            # Such layers may be given the last queries alone, for which no mask would not mean causal.
            kwargs["allow_is_causal_skip"] = False
        return square_mask()
    windowed = kwargs.get("local_size") is not None
    if not torch.compiler.is_dynamo_compiling():
        simpler = _without_empty_blocks(mask_function)
        if simpler is not mask_function and _is_causal_or_window(simpler):
            mask_function, use_vmap, windowed = simpler, False, windowed or _contains(simpler, _WINDOW)
    if _is_other(mask_function, attention_mask, use_vmap, kwargs):
        if not torch.compiler.is_dynamo_compiling() and q_length * kv_length > MAX_DENSE_MASK_TOKENS**2:
            raise ValueError(
                "this model asks for a mask that sparse prefill does not serve (it serves causal, sliding, "
                f"padded and packed ones), of {q_length} x {kv_length} tokens: use attn_implementation='sdpa'"
            )
        # Not skipped: the attention function must see that this is not a causal prompt.
        kwargs["allow_is_causal_skip"] = False
        return square_mask()
    if isinstance(q_offset, Tensor):  # a static cache, before transformers 5.20 or so
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "sparse prefill inside a compiled model does not serve static caches (the compiler does not "
                "know how many tokens they hold): use a dynamic cache"
            )
        q_offset = int(q_offset)
    keys = q_offset + q_length - kv_offset
    packed = mask_function is not causal_mask_function and attention_mask is None and q_length == kv_length
    if packed and not torch.compiler.is_dynamo_compiling():
        packed = _contains(mask_function, _PACKED)
    padding = real_keys(attention_mask, kv_offset, keys)
    shorter = keys if keys != kv_length else None
    return PromptMask(padding, packed, shorter, windowed).as_tensor(batch_size, keys, kwargs.get("device"))


def real_keys(attention_mask: Tensor | None, kv_offset: int, keys: int) -> Tensor | None:
    """Which keys are real, `[B, keys]`, or None where all are; what a short mask does not say is padding.

    Raises:
        ValueError: for a row with gaps; not while tracing.
    """
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + keys].bool()
    if torch.compiler.is_dynamo_compiling():
        return mask
    if mask.shape[1] < keys:
        mask = F.pad(mask, (0, keys - mask.shape[1]))
    if mask.all():
        return None
    # Real tokens must be one run: from the first to the last there is no gap. A row may be all padding: a chunk's.
    edges = mask.int().diff(dim=-1).abs().sum(-1) + mask[:, 0].int() + mask[:, -1].int()
    if not (edges <= 2).all():
        raise ValueError(
            "sparse prefill needs each row's real tokens in attention_mask to be one run, got a row with gaps"
        )
    return mask
