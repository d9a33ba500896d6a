"""Shared by the Triton kernels: launch helpers and small device functions."""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import next_power_of_2

# Lengths, and what follows from them, vary from call to call; specialising on them would compile a kernel for each.
LENGTHS = [
    "q_len", "kv_len", "offset", "length", "blocks", "q_blocks", "kv_blocks", "tiles", "splits", "all_rows", "least",
    "most", "dense_tokens", "lines", "line", "first_width", "width", "step", "first_block",
]  # fmt: skip
LOG2E = 1.4426950408889634


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's GPU, whichever is current."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_at_once(device: torch.device) -> int:
    """Large programs that the device runs at the same time; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def unpadded_ranges(batch: int, kv_len: int, device: torch.device) -> Tensor:
    """`real_ranges` of a batch without padding, by one small launch."""
    return torch.arange(0, kv_len + 1, kv_len, dtype=torch.int32, device=device).expand(batch, 2).contiguous()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with adjacent items in its last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def head_slices(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(width, count) of the slices in which a score tile reads the head dim, so that the tiles fit in shared memory."""
    padded = max(16, next_power_of_2(head_dim))
    width = min(padded, 32 if dtype == torch.float32 else 128 if padded <= 128 else 64)
    return width, padded // width


@triton.jit
def real_range(ranges, batch):
    """(start, end) of a batch element's real tokens."""
    return tl.load(ranges + batch * 2), tl.load(ranges + batch * 2 + 1)


@triton.jit
def denormal_exp(x):
    """Exponential that keeps denormal results: squaring exp(x / 2) avoids the hardware's flush to zero."""
    root = tl.exp(0.5 * x)
    return root * root


@triton.jit
def bits_of(values):
    """Non-negative fp32 as int32 of the same order."""
    return values.to(tl.int32, bitcast=True)


@triton.jit
def top_of_row(bits, count):
    """Which items are among the `count` largest of a row: bits int32 `[N]`, -1 marks items that do not compete.

    Lower index first among equals. The threshold is found two bits of its pattern at a time, without a sort.
    """
    threshold = 0
    way = tl.arange(0, 4)
    for step in tl.static_range(16):
        candidate = threshold | (way << (30 - 2 * step))
        # Bit 31 is the sign: of the highest digit only 0 and 1 are patterns of non-negative numbers.
        possible = (way > 0) & ((step > 0) | (way < 2))
        enough = tl.sum((bits[None, :] >= candidate[:, None]).to(tl.int32), 1) >= count
        threshold |= tl.sum((enough & possible).to(tl.int32), 0) << (30 - 2 * step)
    above = bits > threshold
    ties = bits == threshold
    rank = tl.cumsum(ties.to(tl.int32), 0)
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (ties & (rank <= room))
