"""What `torch.compile` sees of sparse prefill: selection, BlockMask and FlexAttention as one region."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch._inductor.config as inductor_config
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from flexprefill_fa.autocast import no_autocast
from flexprefill_fa.block_mask import assemble, both, causal, causal_at, looked_up, needs_position
from flexprefill_fa.grid import cdiv, positions, real_ranges
from flexprefill_fa.index_lists import both_lists, kept_table
from flexprefill_fa.masks.selector import SelectOperator
from flexprefill_fa.mean_correction import MeanCorrection, correct_by_means, mean_mask, mean_score, with_means
from flexprefill_fa.replay import Replayed, inductor
from flexprefill_fa.uncompiled import attend_uncompiled
from flexprefill_fa.validation import torch_version

# Compiled variants per code object: settings of selectors, dtypes, head dims, padding forms, batch 1 or more, backends.
# Beyond the limit fullgraph compilation raises; torch's default of 8 is too few for one process that serves several
# models, and a sweep over settings has hundreds.
_RECOMPILE_LIMIT = 1024

# The FLASH kernel's log-sum-exp is in natural logarithms, the Triton kernel's in logarithms to base 2. Before torch
# 2.13 FlexAttention multiplies both by ln 2.
_FLASH_LSE_IS_SCALED = torch_version() < (2, 13)

_config_lock = threading.RLock()
_T = TypeVar("_T")

Lists = tuple[Tensor, ...]  # kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices
Position = tuple[Tensor, Tensor, Tensor]
Place = tuple[Tensor | None, Tensor | None, Position | None]  # starts, lengths, position


@torch.compiler.assume_constant_result
def reads_block_lists() -> bool:
    """Whether the graph that is being traced goes to TorchInductor, whose kernels read the block lists.

    Every other backend of `torch.compile` ("eager", "aot_eager", somebody's own) may run FlexAttention by its
    definition, which evaluates the mask_mod alone.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.compiler_fn._compiler_name == "inductor"  # pyright: ignore
    except (ImportError, AttributeError):
        return False


@dataclass(frozen=True)
class Call:
    """What travels with query, key and value into the attention.

    Attributes:
        block_size: tokens per block.
        scale: score scale, None for 1/sqrt(D).
        mask_mod, score_mod: the caller's, as FlexAttention's.
        options: FlexAttention's kernel_options.
        mean_correction: whether dropped blocks count, and by which means.
        sinks: `[Hq]`, for CUDA: a score per head that takes its share of the softmax and gives no value.
    """

    block_size: int
    scale: float | None = None
    mask_mod: Callable[..., Tensor] | None = None
    score_mod: Callable[..., Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    mean_correction: MeanCorrection = False
    sinks: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, lists: Lists, place: Place, call: Call) -> Tensor:
    """Attention over the blocks in `lists`, `[B, Hq, Lq, D]`. Only for tracing, as `select_and_attend`."""
    starts, lengths, position = place
    if not is_dynamo_compiling():  # torch.compile is switched off
        return attend_uncompiled(
            query, key, value, lists, starts, lengths, block_size=call.block_size, scale=call.scale,
            mask_mod=call.mask_mod, score_mod=call.score_mod, mean_correction=call.mean_correction, sinks=call.sinks,
        )  # fmt: skip
    options = call.options if reads_block_lists() else {}
    if call.mean_correction and query.device.type == "cpu":
        return _attend_with_means(query, key, value, lists, place, call, options)
    if position is None and needs_position(query, key, starts, lengths):
        position = positions(query, key, starts, lengths)
    base = causal if position is None else causal_at(position)
    mask_mod = base if call.mask_mod is None else both(base, call.mask_mod)
    arguments: dict[str, Any] = {
        "score_mod": call.score_mod,
        "block_mask": _block_mask(lists, mask_mod, call.block_size, query.shape[2], key.shape[2]),
        "scale": call.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": options or None,
    }
    if not call.mean_correction and call.sinks is None:
        out = flex_attention(query, key, value, **arguments)
        assert isinstance(out, Tensor)  # flex_attention returns more only when asked to
        return out
    out, found = flex_attention(query, key, value, return_aux=AuxRequest(lse=True), **arguments)
    assert isinstance(found, AuxOutput) and found.lse is not None  # asked for
    lse = found.lse
    if options.get("BACKEND") == "FLASH" and _FLASH_LSE_IS_SCALED:
        lse = lse / math.log(2)
    if call.sinks is not None:
        return out * torch.sigmoid(lse - call.sinks.float()[:, None])[..., None].to(out.dtype)
    tilted = call.mean_correction == "tilted"
    return correct_by_means(query, key, value, out, lse, *lists, starts, lengths, call.scale, call.block_size, tilted)


def _block_mask(lists: Lists, mask_mod: Callable[..., Tensor], block_size: int, q_len: int, kv_len: int) -> BlockMask:
    """The BlockMask of per-head lists, for whatever compiles this trace."""
    if not reads_block_lists():
        mask_mod = looked_up(mask_mod, kept_table(*lists, cdiv(kv_len, block_size)), block_size)
    return assemble(*lists, block_size=block_size, mask_mod=mask_mod, q_len=q_len, kv_len=kv_len)


def _attend_with_means(
    query: Tensor, key: Tensor, value: Tensor, lists: Lists, place: Place, call: Call, options: dict[str, Any]
) -> Tensor:
    """`attend` with the means as further keys, where the kernel gives no log-sum-exp."""
    tilted = call.mean_correction == "tilted"
    found = with_means(query, key, value, *lists, *place[:2], call.scale, call.block_size, tilted)
    more_keys, more_values, extended, bias = found[0], found[1], found[2:6], found[10]
    mask_mod = mean_mask(found[6], found[7], found[8], found[9], call.block_size)
    arguments: dict[str, Any] = {
        "score_mod": mean_score(bias),
        "block_mask": _block_mask(extended, mask_mod, call.block_size, query.shape[2], more_keys.shape[2]),
        "scale": call.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": options or None,
    }
    out = flex_attention(query, more_keys, more_values, **arguments)
    assert isinstance(out, Tensor)
    return out


def select_and_attend(
    query: Tensor, key: Tensor, value: Tensor, place: Place, operator: SelectOperator, settings: Tensor, call: Call
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Selection and attention as one region for `torch.compile(fullgraph=True)`; see `sparse_prefill_attention`.

    Only for tracing: run eagerly, FlexAttention would compute every block. The BlockMask is built inside the region,
    from the operator's outputs, so that one dynamic graph serves every length, and the settings come as a tensor, so
    that it serves every setting. The position in `place` is what `positions` returns, or None to compute it here where
    the mask needs it: the FLASH kernel cannot read a tensor that the same graph computes, and the CPU kernel does not
    compile with one of dynamic shape from outside.

    Returns:
        The output `[B, Hq, Lq, D]` and what the operator found.
    """
    all_partial = call.mask_mod is not None
    found = operator(query, key, *place[:2], settings, call.scale, call.block_size, all_partial, False)
    return attend(query, key, value, both_lists(found), place, call), found


def causal_lists(query: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    if not is_dynamo_compiling():
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    blocks = cdiv(query.shape[2], block_size)
    # Part of the graph on a GPU, one small kernel; FlexAttention's CPU kernel wants them in memory.
    lists = (_causal_lists_op if query.device.type == "cpu" else causal_lists)(query, blocks)
    block_mask = assemble(*lists, block_size=block_size, mask_mod=causal, q_len=query.shape[2], kv_len=query.shape[2])
    gqa = query.shape[1] != key.shape[1]
    arguments: dict[str, Any] = {"scale": scale, "enable_gqa": gqa, "kernel_options": options or None}
    out = flex_attention(query, key, value, block_mask=block_mask, **arguments)
    assert isinstance(out, Tensor)
    return out


@contextlib.contextmanager
def compile_limits() -> Iterator[None]:
    """What every compiled call of ours runs under: room for variants, and equal sizes not taken for the same size.

    One thread at a time: the compiler's settings belong to the process (up to torch 2.11), and so does its state.
    """
    with (
        _config_lock,
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=_RECOMPILE_LIMIT),
        fx_config.patch(use_duck_shape=False),  # pyright: ignore[reportAttributeAccessIssue]  # added by torch
        inductor_config.patch(_threads()),  # pyright: ignore[reportAttributeAccessIssue]  # added by torch
    ):
        yield


def _threads() -> dict[str, int]:
    """TorchInductor's setting by which processes of other numbers of threads compile kernels of their own.

    Before torch 2.13 its cache gives them each other's; the CPU kernel for fewer threads then writes beyond its room.
    """
    return {"cpp.threads": torch.get_num_threads()} if torch_version() < (2, 13) else {}


def nothing_compiles() -> bool:
    """Whether a compiled call would not run but raise, and make later ones raise too.

    With TORCH_COMPILE_DISABLE=1, and inside a mode that sees every operator, such as a FLOP counter.
    """
    return torch._dynamo.config.disable or is_in_torch_dispatch_mode(include_infra_modes=False)


def compiled(region: Callable[..., _T]) -> Callable[..., _T]:
    """One graph for every length; where torch.compile is switched off by its settings, the region as it is."""
    graph = Replayed(torch.compile(region, fullgraph=True, dynamic=True, backend=inductor), compile_limits)

    def run(*arguments: Any, **named: Any) -> _T:
        return region(*arguments, **named) if nothing_compiles() else graph(*arguments, **named)

    return no_autocast(run)  # not a guard, which would be one more graph


_compiled_attend = compiled(attend)
_compiled_select_and_attend = compiled(select_and_attend)
_compiled_attend_causal = compiled(attend_causal)


def run_select_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    operator: SelectOperator,
    settings: Tensor,
    call: Call,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`select_and_attend` on checked arguments, compiled with as few graphs as possible.

    Two forms: a whole prompt without padding (plain causal mask), and everything else (a mask that reads offset and
    padding from a tensor). Sizes that happen to be equal are not taken for the same size (`use_duck_shape`): batch 2
    with 2 key heads would otherwise be a graph of its own.
    """
    place = _place(query, key, starts, lengths, call.options)
    if is_dynamo_compiling():  # the caller's graph is the region
        return select_and_attend(query, key, value, place, operator, settings, call)
    if call.mean_correction and query.device.type == "cpu":
        # In one graph with the selection, the CPU's template garbles the names of its many sizes.
        all_partial = call.mask_mod is not None
        found = operator(query, key, *place[:2], settings, call.scale, call.block_size, all_partial, False)
        return run_attend(query, key, value, both_lists(found), *place[:2], call), found
    key, value = _apart(query, key, value)
    return _compiled_select_and_attend(query, key, value, place, operator, settings, call)


def run_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: tuple[Tensor, ...],
    starts: Tensor | None,
    lengths: Tensor | None,
    call: Call,
) -> Tensor:
    """`attend` on checked arguments, compiled as `run_select_and_attend` is."""
    place = _place(query, key, starts, lengths, call.options)
    if is_dynamo_compiling():
        return attend(query, key, value, lists, place, call)
    key, value = _apart(query, key, value)
    return _compiled_attend(query, key, value, lists, place, call)


def run_attend_causal(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """`attend_causal` on checked arguments, compiled as `run_select_and_attend` is."""
    if is_dynamo_compiling():
        return attend_causal(query, key, value, **arguments)
    key, value = _apart(query, key, value)
    return _compiled_attend_causal(query, key, value, **arguments)


def _place(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None, options: dict[str, Any]) -> Place:
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
