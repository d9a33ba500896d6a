"""Index lists as a table of flags."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, on_device

CHUNK = 512  # index entries at a time


@triton.jit(do_not_specialize=[*LENGTHS, "partial_stride", "full_stride"])
def _kept_map_kernel(
    partial_counts,  # [rows, q_blocks] int32
    partial_indices,  # [rows, q_blocks, at least as many as counted] int32
    full_counts,
    full_indices,
    kept,  # [rows, q_blocks, kv_blocks] int8, out: 1 where a block is kept
    partial_stride,  # of a row of the indices
    full_stride,
    kv_blocks,
    CHUNK: tl.constexpr,
):
    target = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    kept += target * kv_blocks
    for first in range(0, kv_blocks, CHUNK):
        tl.store(kept + first + lane, tl.zeros([CHUNK], tl.int8), mask=first + lane < kv_blocks)
    tl.debug_barrier()  # of the program's threads: ones come after the zeros
    for kind in tl.static_range(2):
        count = tl.load((partial_counts if kind == 0 else full_counts) + target)
        indices = partial_indices + target * partial_stride if kind == 0 else full_indices + target * full_stride
        for first in range(0, count, CHUNK):
            inside = first + lane < count
            block = tl.load(indices + first + lane, mask=inside, other=0)
            tl.store(kept + block, tl.full([CHUNK], 1, tl.int8), mask=inside)


def kept_map(lists: tuple[Tensor, ...], grid: Grid) -> Tensor:
    """int8 `[B, Hq, nq, nk]`: 1 where a block is kept; lists as of `BlockSelection`."""
    strides = lists[1].stride(2), lists[3].stride(2)
    batch, heads, q_blocks = lists[0].shape
    kept = torch.empty(batch, heads, q_blocks, grid.kv_blocks, dtype=torch.int8, device=lists[0].device)
    with on_device(kept):
        _kept_map_kernel[(q_blocks, batch * heads)](*lists, kept, *strides, grid.kv_blocks, CHUNK=CHUNK)
    return kept
