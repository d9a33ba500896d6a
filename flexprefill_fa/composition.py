"""Unions and intersections of selections."""

from dataclasses import replace

import torch
from torch import Tensor

from flexprefill_fa.grid import unmasked_blocks
from flexprefill_fa.index_lists import index_lists
from flexprefill_fa.selection import BlockSelection, check_selection


def union(first: BlockSelection, second: BlockSelection) -> BlockSelection:
    """The blocks that either selection keeps.

    Both must be for the same call. Blocks go to the partial list where a pair in them is masked, or all of them if
    either selection was made with `all_partial=True`, as a mask_mod needs. The diagnostics are the first one's.
    Nothing is read back from the GPU.

    Raises:
        TypeError: for what is not a selection.
        ValueError: if shapes, lengths, block sizes, devices or padding differ (padding on a GPU is not compared).
    """
    _check(first, second)
    return _combined(first, second, first.to_dense() | second.to_dense())


def intersection(first: BlockSelection, second: BlockSelection) -> BlockSelection:
    """The blocks that both selections keep, as `union`."""
    _check(first, second)
    return _combined(first, second, first.to_dense() & second.to_dense())


def _check(first: BlockSelection, second: BlockSelection) -> None:
    for selection in (first, second):
        check_selection(selection)
    shapes = [
        (*selection.kv_num_blocks.shape[:2], selection.q_len, selection.kv_len, selection.block_size)
        for selection in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "selections must agree in (batch, heads, q_len, kv_len, block_size), "
            f"got {tuple(shapes[0])} and {tuple(shapes[1])}"
        )
    devices = first.kv_num_blocks.device, second.kv_num_blocks.device
    if devices[0] != devices[1]:
        raise ValueError(f"selections must be on one device, got {devices[0]} and {devices[1]}")
    ranges = first.ranges, second.ranges
    if ranges[0].device.type == "cpu" and not torch.equal(*ranges):
        raise ValueError(
            f"selections must have the same padding, got real ranges {ranges[0].tolist()} and {ranges[1].tolist()}"
        )


def _combined(first: BlockSelection, second: BlockSelection, keep: Tensor) -> BlockSelection:
    all_partial = first.all_partial or second.all_partial
    full = keep & unmasked_blocks(first.grid, first.ranges)[:, None] & (not all_partial)
    (count, indices), (full_count, full_indices) = index_lists(keep & ~full), index_lists(full)
    return replace(
        first,
        kv_num_blocks=count,
        kv_indices=indices,
        full_kv_num_blocks=full_count,
        full_kv_indices=full_indices,
        all_partial=all_partial,
    )
