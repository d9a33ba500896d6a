"""Mean correction: a dropped block counts with one key and one value that stand for it, see `block_summaries.py`.

Each dropped block J whose last real key is visible to a query adds exp(bias_J + s q . K_J) to the denominator of that
query's softmax, and the same times V_J to the numerator. Two ways to the same sums:

- `correct_by_means` adds them to finished attention and merges by log-sum-exp. For CUDA, by TRITON and FLASH alike: the
  main call stays as it is, where a score_mod for the means would run on all of its blocks.
- `with_means` appends K and V as further keys and values, for one FlexAttention call with a mask_mod that admits those
  of dropped blocks and a score_mod that adds the bias. On the CPU, whose kernel gives no log-sum-exp.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa.block_summaries import real_positions, summaries
from flexprefill_fa.grid import Grid, cdiv, real_ranges
from flexprefill_fa.index_lists import kept_table

MeanCorrection = bool | Literal["tilted"]
"""Whether dropped blocks count: not, by their means (True, arXiv 2608.19758), or by tilted ones."""

_UNSEEN = 2**31 - 1  # no position is this far


@torch.library.custom_op("flexprefill_fa::correct_by_means", mutates_args=(), device_types="cuda")
def correct_by_means(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    block_size: int,
    tilted: bool,
) -> Tensor:
    """Attention over kept blocks, corrected by the means of the dropped ones.

    Args:
        query: `[B, Hq, Lq, D]`. key, value: `[B, Hkv, Lkv, D]`.
        out: `[B, Hq, Lq, D]`, attention over the kept blocks. lse: fp32 `[B, Hq, Lq]`, its log-sum-exp.
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices: the kept blocks.
        starts, lengths: int `[B]`, first real key and number of real keys, or None.
        scale: score scale, None for 1/sqrt(D).
        block_size: tokens per block.
        tilted: by tilted means.

    Returns:
        `[B, Hq, Lq, D]`.
    """
    from flexprefill_fa.kernels.mean_correction import correct  # Triton only where it runs

    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    lists = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
    return correct(query, key, value, out, lse, lists, starts, lengths, factor, block_size, tilted)


@correct_by_means.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    block_size: int,
    tilted: bool,
) -> Tensor:
    return torch.empty_like(out)


@torch.library.custom_op("flexprefill_fa::with_means", mutates_args=())
def with_means(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    block_size: int,
    tilted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The attention problem with a key and a value for every block as further ones, behind the real ones.

    Args:
        query, key, value, kv_num_blocks ... tilted: as for `correct_by_means`.

    Returns:
        key and value `[B, H, (nk + nx) * block, D]`, nx blocks of summaries (H is Hq for tilted ones, else Hkv); the
        four index tensors, whose partial list also has the blocks of summaries that a row may see; and what `mean_mask`
        and `mean_score` read: offset int32 `[B + 1]`, slot int32 `[keys]` (0 for a real key, 1 + J for block J), bound
        int32 `[B, keys]` (the position from which a key is visible), permit bool `[B, Hq, nq, 1 + nk]`, bias fp32 `[B,
        Hq, keys]`.
    """
    batch, heads, q_len, dim = query.shape
    grid = Grid(q_len, key.shape[2], block_size)
    device, blocks = key.device, grid.kv_blocks
    extra = cdiv(blocks, block_size)
    unused = extra * block_size - blocks
    factor = 1 / math.sqrt(dim) if scale is None else scale
    position = real_positions(real_ranges(starts, lengths, batch, grid.kv_len, device), grid)
    means = summaries(query, key, value, position, factor, tilted)

    def lengthened(values: Tensor, more: Tensor) -> Tensor:
        padded = F.pad(values, (0, 0, 0, blocks * block_size - grid.kv_len))
        padded = padded.repeat_interleave(more.shape[1] // values.shape[1], 1)
        return torch.cat((padded, F.pad(more, (0, 0, 0, unused))), 2)

    each = position.flatten(1)
    bound = torch.cat((torch.where(each < 0, _UNSEEN, each), means[3].clamp(max=_UNSEEN)), 1)
    bound = F.pad(bound, (0, unused), value=_UNSEEN)
    bias = means[2].repeat_interleave(heads // means[2].shape[1], 1).clamp(min=torch.finfo(torch.float32).min)
    bias = F.pad(bias, (blocks * block_size, unused))
    slot = F.pad(1 + torch.arange(blocks, device=device), (blocks * block_size, unused))

    kept = kept_table(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, blocks)
    permit = F.pad(~kept, (1, 0), value=True)
    width = blocks + extra
    row_last = (grid.offset + (torch.arange(grid.q_blocks, device=device) + 1) * block_size).clamp(max=grid.kv_len) - 1
    seen = (row_last // block_size // block_size + 1).to(torch.int32)  # blocks of means that a row may see
    column = torch.arange(width, dtype=torch.int32, device=device)
    behind = column - kv_num_blocks[..., None]
    old = F.pad(kv_indices, (0, width - kv_indices.shape[-1]))
    indices = torch.where(behind < 0, old, blocks + behind.clamp(max=extra - 1)).to(torch.int32)
    full = F.pad(full_kv_indices, (0, width - full_kv_indices.shape[-1]))
    offset = torch.full((batch + 1,), grid.offset, dtype=torch.int32, device=device)
    return (
        lengthened(key, means[0]),
        lengthened(value, means[1]),
        (kv_num_blocks + seen).to(torch.int32),
        indices.contiguous(),
        full_kv_num_blocks.clone(),
        full.contiguous(),
        offset,
        slot.to(torch.int32),
        bound.to(torch.int32),
        permit.contiguous(),
        bias,
    )


@with_means.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    block_size: int,
    tilted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, kv_heads, kv_len, dim = key.shape
    heads, rows = kv_num_blocks.shape[1:]
    blocks = cdiv(kv_len, block_size)
    width = blocks + cdiv(blocks, block_size)
    keys = width * block_size
    indices = kv_indices.new_empty((batch, heads, rows, width))
    vector = kv_indices.new_empty
    return (
        key.new_empty((batch, heads if tilted else kv_heads, keys, dim)),
        value.new_empty((batch, heads if tilted else kv_heads, keys, dim)),
        torch.empty_like(kv_num_blocks),
        indices,
        torch.empty_like(kv_num_blocks),
        torch.empty_like(indices),
        vector((batch + 1,)),
        vector((keys,)),
        vector((batch, keys)),
        query.new_empty((batch, heads, rows, 1 + blocks), dtype=torch.bool),
        query.new_empty((batch, heads, keys), dtype=torch.float32),
    )


def mean_mask(offset: Tensor, slot: Tensor, bound: Tensor, permit: Tensor, block_size: int) -> Callable[..., Tensor]:
    """The mask_mod of `with_means`: real keys causally, dropped blocks once they are wholly visible."""

    # Literal block sizes, as in `looked_up`.
    def mask_128(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (bound[b, kv_idx] <= q_idx + offset[b]) & permit[b, h, q_idx // 128, slot[kv_idx]]

    def mask_64(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (bound[b, kv_idx] <= q_idx + offset[b]) & permit[b, h, q_idx // 64, slot[kv_idx]]

    return mask_128 if block_size == 128 else mask_64


def mean_score(bias: Tensor) -> Callable[..., Tensor]:
    """The score_mod of `with_means`."""

    def weighted(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias[b, h, kv_idx]

    return weighted
