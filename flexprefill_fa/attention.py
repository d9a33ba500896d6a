"""Sparse prefill attention in one call: select, build the BlockMask, run compiled FlexAttention."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexprefill_fa.backends import kernel_options, resolve_backend
from flexprefill_fa.block_mask import assemble, both, causal, causal_at, needs_position
from flexprefill_fa.grid import positions, real_ranges
from flexprefill_fa.masks.selector import SelectOperator, SelectorConfig, check_selector, select_blocks
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import check_padding, check_query_key, check_scale, check_value

logger = logging.getLogger(__name__)

# Compiled variants per code object: dtypes, head dims, padding forms, batch 1 or more, backends. Beyond the limit
# fullgraph compilation raises; torch's default of 8 is too few for one process that serves several models.
_RECOMPILE_LIMIT = 64
# The largest square mask that dense attention may build: 64 MB per batch element.
_MAX_DENSE_MASK_TOKENS = 8192


def select_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    position: tuple[Tensor, Tensor, Tensor] | None,
    operator: SelectOperator,
    settings: Tensor,
    *,
    block_size: int,
    scale: float | None,
    mask_mod: Callable[..., Tensor] | None,
    score_mod: Callable[..., Tensor] | None,
    options: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Selection and attention as one region for `torch.compile(fullgraph=True)`; see `sparse_prefill_attention`.

    Only for tracing: run eagerly, FlexAttention would compute every block. The BlockMask is built inside the region,
    from the operator's outputs, so that one dynamic graph serves every length, and the settings come as a tensor, so
    that it serves every setting. `position` is what `positions` returns, or None to compute it here where the mask
    needs it: the FLASH kernel cannot read a tensor that the same graph computes, and the CPU kernel does not compile
    with one of dynamic shape from outside.

    Returns:
        The output `[B, Hq, Lq, D]` and the operator's index tensors and JS distances.
    """
    lists = operator(query, key, starts, lengths, settings, scale, block_size, mask_mod is not None, False)
    if position is None and needs_position(query, key, starts, lengths):
        position = positions(query, key, starts, lengths)
    base = causal if position is None else causal_at(position)
    block_mask = assemble(
        *lists[:4],
        block_size=block_size,
        mask_mod=base if mask_mod is None else both(base, mask_mod),
        q_len=query.shape[2],
        kv_len=key.shape[2],
    )
    out = flex_attention(  # pyright: ignore[reportCallIssue]
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options or None,  # pyright: ignore[reportArgumentType]  # built by kernel_options()
    )
    assert isinstance(out, Tensor)  # flex_attention returns more only when asked to
    return out, lists


_compiled_select_and_attend = torch.compile(select_and_attend, fullgraph=True, dynamic=True)


def run_compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: SelectorConfig,
    settings: Tensor,
    **arguments: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """`select_and_attend` on checked arguments, compiled with as few graphs as possible.

    Two forms: a whole prompt without padding (plain causal mask), and everything else (a mask that reads offset and
    padding from a tensor). Sizes that happen to be equal are not taken for the same size (`use_duck_shape`): batch 2
    with 2 key heads would otherwise be a graph of its own.
    """
    position = None
    if needs_position(query, key, starts, lengths):
        ranges = real_ranges(starts, lengths, query.shape[0], key.shape[2], query.device)
        starts, lengths = ranges[:, 0].contiguous(), ranges[:, 1] - ranges[:, 0]
        if arguments["options"].get("BACKEND") == "FLASH":
            position = positions(query, key, starts, lengths)
            for vector in position:  # a size known to the compiler: that kernel takes no symbolic ones
                torch._dynamo.mark_static(vector, 0)
    if torch.compiler.is_compiling():  # the caller's graph is the region
        region = select_and_attend
        limits = contextlib.nullcontext()
    else:
        region = _compiled_select_and_attend
        limits = _compile_limits()
        if query.device.type == "cpu":
            key, value = _unshared(query, key), _unshared(query, _unshared(key, value))
    with limits:
        return region(
            query,
            key,
            value,
            starts,
            lengths,
            position,
            config.operator(),
            settings,
            block_size=config.block_size,
            **arguments,
        )


def _unshared(first: Tensor, second: Tensor) -> Tensor:
    """`second` in memory of its own: torch 2.11's CPU kernel fails on views of one buffer."""
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return second.clone() if same else second


@contextlib.contextmanager
def _compile_limits() -> Iterator[None]:
    with (
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT),
        fx_config.patch(use_duck_shape=False),  # pyright: ignore[reportAttributeAccessIssue]  # added by torch
    ):
        yield


def dense_mask_fits(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    mask_mod: Callable[..., Tensor] | None = None,
) -> bool:
    """Whether `dense_attention` needs no mask for this call, or one small enough to hold."""
    return (
        (mask_mod is None and not needs_position(query, key, starts, lengths))
        or query.shape[2] * key.shape[2] <= _MAX_DENSE_MASK_TOKENS**2
        or query.shape[2] == 1
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    mask_mod: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Dense causal attention by SDPA, for short prompts and decode steps. Rows of padded queries mean nothing.

    Padding, a cached prefix or a mask_mod needs a mask `[B, 1, Lq, Lkv]`: keep Lq or Lkv short.
    """
    gqa = query.shape[1] != key.shape[1]
    q_len, kv_len = query.shape[2], key.shape[2]
    if starts is None and lengths is None and mask_mod is None and (q_len == kv_len or q_len == 1):
        return F.scaled_dot_product_attention(query, key, value, is_causal=q_len > 1, scale=scale, enable_gqa=gqa)
    ranges = real_ranges(starts, lengths, query.shape[0], kv_len, query.device)
    kv_position = torch.arange(kv_len, device=query.device)
    q_position = kv_len - q_len + torch.arange(q_len, device=query.device)
    # A padded query sees at least one key (its own position or, before the first real key, key 0): never 0 / 0.
    real = (kv_position >= ranges[:, :1]) & (kv_position < ranges[:, 1:])
    alone = (q_position < ranges[:, :1])[:, :, None] & (kv_position == 0)
    mask = (kv_position <= q_position[:, None]) & real[:, None]
    if mask_mod is not None:
        batch = torch.arange(query.shape[0], device=query.device)[:, None, None]
        mask = mask & mask_mod(batch, 0, torch.arange(q_len, device=query.device)[:, None], kv_position)
    mask = mask | alone
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=gqa)


def sparse_prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SelectorConfig,
    *,
    scale: float | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    backend: str = "auto",
    return_selection: bool = False,
) -> Any:
    """Causal attention over the key blocks that a selector keeps.

    The first call of a kind (dtype, head dim, padding or none, batch 1 or more) compiles for some seconds; later ones
    of any length reuse the graph. Prompts short enough to keep every block, and single queries, run as dense SDPA
    when backend is "auto" and there is no mask_mod or score_mod.

    Args:
        query: `[B, Hq, Lq, D]`, fp32, bf16 or fp16; the last Lq positions of the keys.
        key, value: `[B, Hkv, Lkv, D]`, Hq a multiple of Hkv. Padded rows must be finite: they get weight 0, and
            0 x NaN is NaN.
        config: the selector and its settings, e.g. `FlexPrefillConfig(gamma=0.95)`.
        scale: score scale for selection and attention, default 1/sqrt(D).
        lengths: number of real keys of each batch element, int `[B]`; starts: position of its first real key.
        mask_mod: a further mask, in FlexAttention's sense (q_idx counts from the first query, kv_idx from the first
            key). The selector does not see it. Every block is then masked pair by pair, which costs up to 2x.
        score_mod: FlexAttention's score_mod. The selector does not see it.
        backend: "auto", or "TRITON", "FLASH" or "CPU" to insist.
        return_selection: also return the `BlockSelection`.

    Returns:
        `[B, Hq, Lq, D]`, or (that, BlockSelection). Rows of padded queries mean nothing.

    Raises:
        ValueError, TypeError: for arguments that do not fit, inputs that require grad, or a backend that cannot run.
    """
    check_selector(config)
    check_query_key(query, key)
    check_value(key, value)
    check_scale(scale)
    starts, lengths = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
    resolved = resolve_backend(
        backend,
        query,
        config.block_size,
        has_score_mod=score_mod is not None,
        has_mask_mod=mask_mod is not None,
        position_in_graph=torch.compiler.is_compiling() and needs_position(query, key, starts, lengths),
    )
    short = query.shape[2] == 1 or key.shape[2] <= config.dense_tokens
    short = short and dense_mask_fits(query, key, starts, lengths)
    if short and backend == "auto" and mask_mod is None and score_mod is None:
        logger.debug("dense attention: %d queries, %d keys", query.shape[2], key.shape[2])
        out = dense_attention(query, key, value, starts, lengths, scale)
        if not return_selection:
            return out
        return out, select_blocks(query, key, config, lengths=lengths, starts=starts, scale=scale)
    logger.debug("sparse attention by %s: %d queries, %d keys", resolved, query.shape[2], key.shape[2])
    options = kernel_options(resolved, query, config.block_size)
    out, lists = run_compiled(
        query,
        key,
        value,
        starts,
        lengths,
        config,
        config.settings(),
        scale=scale,
        mask_mod=mask_mod,
        score_mod=score_mod,
        options=options,
    )
    if not return_selection:
        return out
    return out, BlockSelection(*lists, query.shape[2], key.shape[2], config.block_size, starts, lengths)
