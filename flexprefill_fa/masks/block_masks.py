"""From queries and keys to a selection or a BlockMask, by any selector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill_fa.block_mask import base_mask_mod, looked_up, to_block_mask
from flexprefill_fa.masks.selector import Selector, check_selector, in_words
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import check_padding, check_query_key, check_scale


def select_blocks(
    query: Tensor,
    key: Tensor,
    config: Selector,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    all_partial: bool = False,
) -> BlockSelection:
    """Run a selector.

    Args:
        query: `[B, Hq, Lq, D]`, the last Lq positions of the keys. key: `[B, Hkv, Lkv, D]`.
        config: which selector, and its settings.
        lengths: number of real keys of each batch element; starts: its first real key. Default: all keys are real.
        scale: score scale, default 1/sqrt(D).
        all_partial: put every kept block in the partial list, for a mask_mod that may mask anywhere.

    Returns:
        The selection; nothing in it has been read back from the GPU.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
    """
    check_selector(config)
    check_query_key(query, key)
    check_scale(scale)
    starts, lengths = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
    size = config.block_size
    found = config.operator()(query, key, starts, lengths, config.settings(), scale, size, all_partial, False)
    return BlockSelection.of(found, config.diagnostics, query, key, size, starts, lengths, all_partial)


def create_block_mask(
    query: Tensor,
    key: Tensor,
    config: Selector,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    eager_safe: bool = True,
) -> BlockMask:
    """The blocks that a selector keeps, as a BlockMask for `flex_attention`.

    Call `flex_attention` compiled, with `fullgraph=True`: uncompiled it computes every block, whatever the lists say.

    Args:
        query: `[B, Hq, Lq, D]`, fp32, bf16 or fp16; the last Lq positions of the keys.
        key: `[B, Hkv, Lkv, D]`; query head h reads key head `h // (Hq // Hkv)`.
        config: which selector, and its settings.
        lengths: number of real keys of each batch element (right padding), int `[B]`.
        starts: position of its first real key (left padding), int `[B]`.
        scale: score scale, default 1/sqrt(D). Use the same in `flex_attention`.
        eager_safe: let `mask_mod` look the selection up too, so that the mask means the same thing uncompiled, under
            `create_mask` and in `and_masks`. Costs a bool `[B, Hq, nq, nk]` and, at 9 % density, 5 to 8 % of the
            attention's time at 64K tokens and 8 to 18 % at 16K on an H200. False leaves the plain causal mask.

    Returns:
        A BlockMask with per-head lists `[B, Hq, nq]`, without the lists that only a backward pass needs.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
    """
    selection = select_blocks(query, key, config, lengths=lengths, starts=starts, scale=scale)
    mask_mod = base_mask_mod(query, key, selection.starts, selection.lengths)
    if eager_safe:
        mask_mod = looked_up(mask_mod, selection.to_dense(), selection.block_size)
    return to_block_mask(selection, mask_mod)


def mask_function(kind: type[Selector]) -> Callable[..., BlockMask]:
    """`create_<name>_block_mask` of a selector."""

    def create(
        query: Tensor,
        key: Tensor,
        *,
        config: Selector | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        starts: Tensor | Sequence[int] | None = None,
        scale: float | None = None,
        eager_safe: bool = True,
        **config_fields: Any,
    ) -> BlockMask:
        place: dict[str, Any] = {"lengths": lengths, "starts": starts, "scale": scale, "eager_safe": eager_safe}
        return create_block_mask(query, key, config_of(kind, config, config_fields), **place)

    settings = ", ".join(_field_names(kind))
    create.__name__ = create.__qualname__ = f"create_{kind.name}_block_mask"
    summary = (kind.__doc__ or "").strip().partition("\n")[0]
    create.__doc__ = f"""`create_block_mask` with the selector {kind.name}: {summary}

    Give a `config`, or settings of its own as keyword arguments: {settings} (see `{kind.__name__}`). Everything else,
    and what is raised, as for `create_block_mask`.
    """
    return create


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def config_of(kind: type[Selector], config: Selector | None, config_fields: dict[str, Any]) -> Selector:
    """`config` itself, or a new one from its fields; not both.

    Raises:
        TypeError: for both, an unknown field, or another selector's config.
    """
    if config is None:
        known = _field_names(kind)
        unknown = sorted(set(config_fields) - set(known))
        if unknown:
            raise TypeError(f"unexpected argument {', '.join(unknown)}; {kind.__name__} has {', '.join(known)}")
        return kind(**config_fields)
    if config_fields:
        raise TypeError(f"give either config or its fields, got both: config and {', '.join(sorted(config_fields))}")
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {in_words(config)}")
    return config
