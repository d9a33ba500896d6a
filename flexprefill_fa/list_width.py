"""Index lists as wide as the fullest row needs, where lists of full width would take gigabytes.

Both lists of full width take 8 bytes for each head and pair of blocks: 1.1 GB at 256K tokens (32 heads, blocks of 128),
17 GB at 1M, of which a selection of 5 % fills 0.9. How wide they must be is known once the blocks are chosen, so
above `WIDE_BYTES` the host waits for the fullest row's count, some kv heads at a time: at such lengths a selection
takes far longer than the wait. Shorter prompts, prompts in the caller's graph, and those captured in a CUDA graph get
lists of full width, and nothing waits.
"""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.selector import Lists, Selector

WIDE_BYTES = 2**31
PIECE_BYTES = 2**30  # of full-width lists at a time, where one kv head does not take more


def full_width_bytes(query: Tensor, key: Tensor, block_size: int) -> int:
    """What both lists of full width take."""
    return 8 * query.shape[0] * query.shape[1] * cdiv(query.shape[2], block_size) * cdiv(key.shape[2], block_size)


def too_wide(query: Tensor, key: Tensor, block_size: int) -> bool:
    """Whether lists are to be cut: only CUDA's kernels take a partial list of fewer columns than there are blocks."""
    if not query.is_cuda or is_dynamo_compiling() or full_width_bytes(query, key, block_size) <= WIDE_BYTES:
        return False
    return not torch.cuda.is_current_stream_capturing()


def select_narrow(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: Selector,
    settings: Tensor,
    scale: float | None,
    all_partial: bool,
) -> Lists:
    """What `config.operator()` finds, in lists of the fullest row's width (at least 1); waits for the GPU.

    One kv head at a time, or as many as `PIECE_BYTES` holds, so that lists of full width never stand there whole. A
    rule in plain PyTorch may look at all heads at once, and gets them.
    """
    kind, kv_heads = type(config), key.shape[1]
    groups = query.shape[1] // kv_heads
    at_once = kv_heads
    if kind.triton is not None or kind.pattern is not Selector.pattern:
        at_once = max(1, PIECE_BYTES * kv_heads // full_width_bytes(query, key, config.block_size))
    pieces = []
    for first in range(0, kv_heads, at_once):
        q, k = query[:, first * groups : (first + at_once) * groups], key[:, first : first + at_once]
        pieces.append(
            _cut(kind.operator()(q, k, starts, lengths, settings, scale, config.block_size, all_partial, False))
        )
    return tuple(_joined(tensors) for tensors in zip(*pieces, strict=True)) if len(pieces) > 1 else pieces[0]


def _cut(found: Lists) -> Lists:
    """The lists without the columns that no row fills."""
    count, indices, full_count, full_indices, *reports = found
    width = max(1, int(torch.maximum(count, full_count).max()))
    return count, indices[..., :width].contiguous(), full_count, full_indices[..., :width].contiguous(), *reports


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """Tensors `[B, heads, ...]` of some heads each, as one; entries past a narrower one's width are unwritten."""
    if tensors[0].dim() < 4:
        return torch.cat(tensors, 1)
    heads, width = sum(x.shape[1] for x in tensors), max(x.shape[3] for x in tensors)
    batch, _, rows, _ = tensors[0].shape
    joined = tensors[0].new_empty((batch, heads, rows, width))
    first = 0
    for x in tensors:
        joined[:, first : first + x.shape[1], :, : x.shape[3]] = x
        first += x.shape[1]
    return joined
