"""What `torch.compile` sees of sparse prefill: selection, BlockMask and FlexAttention as one region."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

from flexprefill_fa.block_mask import assemble, both, causal, causal_at, needs_position
from flexprefill_fa.grid import cdiv, positions, real_ranges
from flexprefill_fa.masks.selector import SelectOperator, SelectorConfig
from flexprefill_fa.mean_correction import correct_by_means, mean_mask, mean_score, with_means
from flexprefill_fa.validation import torch_version

# Compiled variants per code object: settings of selectors, dtypes, head dims, padding forms, batch 1 or more, backends.
# Beyond the limit fullgraph compilation raises; torch's default of 8 is too few for one process that serves several
# models, and a sweep over settings has hundreds.
_RECOMPILE_LIMIT = 1024

# The FLASH kernel's log-sum-exp is in natural logarithms, the Triton kernel's in logarithms to base 2. Before torch
# 2.13 FlexAttention multiplies both by ln 2.
_FLASH_LSE_IS_SCALED = torch_version() < (2, 13)

Lists = tuple[Tensor, Tensor, Tensor, Tensor]
Position = tuple[Tensor, Tensor, Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    starts: Tensor | None,
    lengths: Tensor | None,
    position: Position | None,
    *,
    block_size: int,
    scale: float | None,
    mask_mod: Callable[..., Tensor] | None,
    score_mod: Callable[..., Tensor] | None,
    options: dict[str, Any],
    mean_correction: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over the blocks in `lists`, `[B, Hq, Lq, D]`. Only for tracing, as `select_and_attend`.

    `sinks` `[Hq]`, for CUDA: a score per head that takes its share of the softmax and gives no value.
    """
    if mean_correction and query.device.type == "cpu":
        return _attend_with_means(query, key, value, lists, starts, lengths, block_size, scale, options)
    if position is None and needs_position(query, key, starts, lengths):
        position = positions(query, key, starts, lengths)
    base = causal if position is None else causal_at(position)
    block_mask = assemble(
        *lists,
        block_size=block_size,
        mask_mod=base if mask_mod is None else both(base, mask_mod),
        q_len=query.shape[2],
        kv_len=key.shape[2],
    )
    arguments: dict[str, Any] = {
        "score_mod": score_mod,
        "block_mask": block_mask,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": options or None,
    }
    if not mean_correction and sinks is None:
        out = flex_attention(query, key, value, **arguments)
        assert isinstance(out, Tensor)  # flex_attention returns more only when asked to
        return out
    out, found = flex_attention(query, key, value, return_aux=AuxRequest(lse=True), **arguments)
    assert isinstance(found, AuxOutput) and found.lse is not None  # asked for
    lse = found.lse
    if options.get("BACKEND") == "FLASH" and _FLASH_LSE_IS_SCALED:
        lse = lse / math.log(2)
    if sinks is not None:
        return out * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(out.dtype)
    return correct_by_means(query, key, value, out, lse, *lists, starts, lengths, scale, block_size)


def _attend_with_means(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    starts: Tensor | None,
    lengths: Tensor | None,
    block_size: int,
    scale: float | None,
    options: dict[str, Any],
) -> Tensor:
    """`attend` with the means as further keys, where the kernel gives no log-sum-exp."""
    found = with_means(query, key, value, *lists, starts, lengths, block_size)
    more_keys, more_values, extended, bias = found[0], found[1], found[2:6], found[10]
    block_mask = assemble(
        *extended,
        block_size=block_size,
        mask_mod=mean_mask(found[6], found[7], found[8], found[9], block_size),
        q_len=query.shape[2],
        kv_len=more_keys.shape[2],
    )
    out = flex_attention(  # pyright: ignore[reportCallIssue]
        query,
        more_keys,
        more_values,
        score_mod=mean_score(bias),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options or None,  # pyright: ignore[reportArgumentType]  # built by kernel_options()
    )
    assert isinstance(out, Tensor)
    return out


def select_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    position: Position | None,
    operator: SelectOperator,
    settings: Tensor,
    *,
    block_size: int,
    scale: float | None,
    mask_mod: Callable[..., Tensor] | None,
    score_mod: Callable[..., Tensor] | None,
    options: dict[str, Any],
    mean_correction: bool = False,
    sinks: Tensor | None = None,
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
    out = attend(
        query,
        key,
        value,
        lists[:4],
        starts,
        lengths,
        position,
        block_size=block_size,
        scale=scale,
        mask_mod=mask_mod,
        score_mod=score_mod,
        options=options,
        mean_correction=mean_correction,
        sinks=sinks,
    )
    return out, lists


def causal_lists(query: Tensor, blocks: int) -> Lists:
    """Every causal block of a whole prompt, for all heads at once: the diagonal partial, the rest full."""
    row = torch.arange(blocks, dtype=torch.int32, device=query.device)
    full, diagonal = row.repeat(1, 1, blocks, 1), row[:, None].repeat(1, 1, 1, blocks)
    return torch.ones_like(row)[None, None], diagonal, row[None, None], full


@torch.library.custom_op("flexprefill_fa::causal_lists", mutates_args=())
def _causal_lists_op(query: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return causal_lists(query, blocks)


@_causal_lists_op.register_fake
def _(query: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = query.new_empty((1, 1, blocks), dtype=torch.int32)
    indices = query.new_empty((1, 1, blocks, blocks), dtype=torch.int32)
    return count, indices, torch.empty_like(count), torch.empty_like(indices)


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, *, block_size: int, scale: float | None, options: dict[str, Any]
) -> Tensor:
    """Dense causal attention of a whole prompt by FlexAttention, `[B, Hq, L, D]`. Only for tracing."""
    blocks = cdiv(query.shape[2], block_size)
    # Part of the graph on a GPU, one small kernel; FlexAttention's CPU kernel wants them in memory.
    lists = (_causal_lists_op if query.device.type == "cpu" else causal_lists)(query, blocks)
    arguments: dict[str, Any] = {"block_size": block_size, "scale": scale, "options": options}
    return attend(query, key, value, lists, None, None, None, mask_mod=None, score_mod=None, **arguments)


_compiled_attend = torch.compile(attend, fullgraph=True, dynamic=True)
_compiled_select_and_attend = torch.compile(select_and_attend, fullgraph=True, dynamic=True)
_compiled_attend_causal = torch.compile(attend_causal, fullgraph=True, dynamic=True)


def run_select_and_attend(
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
    place = _place(query, key, starts, lengths, arguments["options"])
    arguments["block_size"] = config.block_size
    if torch.compiler.is_compiling():  # the caller's graph is the region
        return select_and_attend(query, key, value, *place, config.operator(), settings, **arguments)
    if arguments.get("mean_correction") and query.device.type == "cpu":
        # In one graph with the selection, the CPU's template garbles the names of its many sizes.
        options = arguments["scale"], config.block_size, arguments["mask_mod"] is not None, False
        lists = config.operator()(query, key, *place[:2], settings, *options)
        return run_attend(query, key, value, lists[:4], *place[:2], **arguments), lists
    key, value = _apart(query, key, value)
    with compile_limits():
        return _compiled_select_and_attend(query, key, value, *place, config.operator(), settings, **arguments)


def run_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    starts: Tensor | None,
    lengths: Tensor | None,
    **arguments: Any,
) -> Tensor:
    """`attend` on checked arguments, compiled as `run_select_and_attend` is."""
    place = _place(query, key, starts, lengths, arguments["options"])
    if torch.compiler.is_compiling():
        return attend(query, key, value, lists, *place, **arguments)
    key, value = _apart(query, key, value)
    with compile_limits():
        return _compiled_attend(query, key, value, lists, *place, **arguments)


def run_attend_causal(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """`attend_causal` on checked arguments, compiled as `run_select_and_attend` is."""
    if torch.compiler.is_compiling():
        return attend_causal(query, key, value, **arguments)
    key, value = _apart(query, key, value)
    with compile_limits():
        return _compiled_attend_causal(query, key, value, **arguments)


def _place(
    query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None, Position | None]:
    """`starts`, `lengths` and `position` as the regions take them."""
    position = None
    if needs_position(query, key, starts, lengths):
        ranges = real_ranges(starts, lengths, query.shape[0], key.shape[2], query.device)
        starts, lengths = ranges[:, 0].contiguous(), ranges[:, 1] - ranges[:, 0]
        if options.get("BACKEND") == "FLASH":
            position = positions(query, key, starts, lengths)
            for vector in position:  # a size known to the compiler: that kernel takes no symbolic ones
                torch._dynamo.mark_static(vector, 0)
    return starts, lengths, position


def _apart(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value in memory of their own: torch 2.11's CPU kernel fails on views of one buffer."""
    if query.device.type != "cpu":
        return key, value

    def shared(a: Tensor, b: Tensor) -> bool:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

    if shared(query, value) or shared(key, value):
        value = value.clone()
    return (key.clone() if shared(query, key) else key), value


@contextlib.contextmanager
def compile_limits() -> Iterator[None]:
    """What every compiled call of ours runs under: room for variants, and equal sizes not taken for the same size."""
    with (
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=_RECOMPILE_LIMIT),
        fx_config.patch(use_duck_shape=False),  # pyright: ignore[reportAttributeAccessIssue]  # added by torch
    ):
        yield
