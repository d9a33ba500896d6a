"""Attention over kept blocks in plain PyTorch, for where nothing is compiled.

FlexAttention reads its block lists only inside a kernel that TorchInductor makes. Where `torch.compile` is off
(`TORCH_COMPILE_DISABLE=1`, `TORCHDYNAMO_DISABLE=1`, `torch.compiler.set_stance("force_eager")` and the like), this
takes its place: the definition, one row of blocks at a time, its cost in proportion to the kept blocks.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from flexprefill_fa.autocast import no_autocast
from flexprefill_fa.block_summaries import real_positions, summaries
from flexprefill_fa.grid import Grid, real_ranges
from flexprefill_fa.index_lists import index_lists, kept_table
from flexprefill_fa.mean_correction import MeanCorrection

logger = logging.getLogger(__name__)
_said = False


@no_autocast
def attend_uncompiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: tuple[Tensor, ...],
    starts: Tensor | None,
    lengths: Tensor | None,
    *,
    block_size: int,
    scale: float | None,
    mask_mod: Callable[..., Tensor] | None,
    score_mod: Callable[..., Tensor] | None,
    mean_correction: MeanCorrection = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """What `region.attend` computes, `[B, Hq, Lq, D]`; arguments as there.

    Raises:
        RuntimeError: while a CUDA graph is captured, because this waits for the GPU.
    """
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("sparse prefill can be captured in a CUDA graph only while torch.compile is switched on")
    _say_once()
    batch, heads, q_len, dim = query.shape
    grid = Grid(q_len, key.shape[2], block_size)
    ranges = real_ranges(starts, lengths, batch, grid.kv_len, query.device)
    start, end = ranges.long()[..., None, None].unbind(1)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    mask, score = _over_pairs(mask_mod, False), _over_pairs(score_mod, True)
    keep = kept_table(*lists, grid.kv_blocks)  # [B, H, nq, nk]
    counts, indices = index_lists(keep)
    fill = grid.kv_blocks * block_size - grid.kv_len
    keys, values = (_in_blocks(x, fill, block_size, heads) for x in (key, value))
    means = None
    if mean_correction:
        found = summaries(query, key, value, real_positions(ranges, grid), scale, mean_correction == "tilted")
        means = [x.float().repeat_interleave(heads // x.shape[1], 1) for x in found[:3]], found[3][:, None]
    parts = []
    for row, width in enumerate(counts.amax((0, 1)).tolist()):
        rows = torch.arange(row * block_size, min((row + 1) * block_size, q_len), device=query.device)
        q = query[:, :, rows].float()
        position = (grid.offset + rows)[:, None]  # [R, 1]
        taken = indices[:, :, row, :width].long()  # [B, H, W]
        kv = (taken[..., None] * block_size + torch.arange(block_size, device=query.device)).flatten(2)  # [B, H, K]
        listed = torch.arange(width, device=query.device) < counts[:, :, row, None]
        seen = listed.repeat_interleave(block_size, -1)[:, :, None] & (kv[:, :, None] <= position)
        seen &= (kv[:, :, None] >= start[..., None]) & (kv[:, :, None] < end[..., None])
        inside = kv.clamp(max=grid.kv_len - 1)
        scores = q @ _gather(keys, taken).mT * scale
        if score is not None:
            scores = score(scores, *_pairs(batch, heads, rows, inside))
        if mask is not None:
            seen = seen & mask(*_pairs(batch, heads, rows, inside))
        scores = scores.masked_fill(~seen, -torch.inf)
        v = _gather(values, taken)
        if means is not None:
            (mean_key, mean_value, bias), last = means
            dropped = ~keep[:, :, row, None] & (last[:, None] <= position)
            more = (q @ mean_key.mT * scale + bias[:, :, None]).masked_fill(~dropped, -torch.inf)
            scores, v = torch.cat((scores, more), -1), torch.cat((v, mean_value), 2)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(batch, -1, len(rows), 1)), -1)
        weights = scores.softmax(-1)[..., : v.shape[2]].nan_to_num(0.0)  # a padded row sees nothing
        parts.append((weights @ v).to(query.dtype))
    return torch.cat(parts, 2)


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        logger.warning(
            "torch.compile does not compile here: sparse attention runs in plain PyTorch, with the same result, slowly"
        )


def _in_blocks(x: Tensor, fill: int, block_size: int, heads: int) -> Tensor:
    """`[B, Hkv, L, D]` -> fp32 `[B, Hq, nk, block, D]`."""
    blocks = F.pad(x.float(), (0, 0, 0, fill)).unflatten(2, (-1, block_size))
    return blocks.repeat_interleave(heads // x.shape[1], 1)


def _gather(blocks: Tensor, taken: Tensor) -> Tensor:
    """The taken blocks `[B, H, W]` of `[B, H, nk, block, D]`, as `[B, H, W * block, D]`."""
    index = taken[..., None, None].expand(-1, -1, -1, *blocks.shape[3:])
    return blocks.gather(2, index).flatten(2, 3)


def _pairs(batch: int, heads: int, rows: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The indices that a mask_mod or score_mod takes; kv `[B, H, K]`, for each head its own."""
    return torch.arange(batch, device=kv.device), torch.arange(heads, device=kv.device), rows, kv


def _over_pairs(mod: Callable[..., Tensor] | None, scored: bool) -> Callable[..., Any] | None:
    """A mask_mod or score_mod, written for one pair, over b `[B]`, h `[H]`, q `[R]` and kv `[B, H, K]` at once."""
    if mod is None:
        return None
    first = (0,) if scored else ()
    function = mod
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, 0), (0, None, None, 0)):
        function = torch.vmap(function, in_dims=first + dims)

    def over_pairs(*arguments: Tensor) -> Tensor:
        with TransformGetItemToIndex():  # captured tensors are indexed by vmap's own
            return function(*arguments)

    return over_pairs
