"""FlashPrefill's selection in Triton: one pass of the queries over the pooled keys, no host synchronisation."""

import math

import torch
from torch import Tensor

from flexprefill_fa.kernels.outputs import empty_lists, prepare
from flexprefill_fa.masks.flashprefill.config import FlashPrefillConfig
from flexprefill_fa.masks.flashprefill.kernels.rows import write_rows
from flexprefill_fa.masks.flashprefill.kernels.scores import block_scores, pooled_keys

SCORE_BYTES = 2**27  # scores in memory at a time: all of 32 heads at 128K tokens, a part beyond


def select(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: FlashPrefillConfig,
    scale: float | None = None,
    all_partial: bool = False,
    zero_tails: bool = False,
) -> tuple[Tensor, ...]:
    """The same as the rule in `reference`; entries past the counts are unwritten unless zero_tails.

    Raises:
        ValueError: for more key blocks than the row writer can count.
    """
    query, key, grid, ranges = prepare(query, key, starts, lengths, config.block_size)
    batch, heads, _, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    lists = empty_lists(batch, heads, grid, query.device)
    keys = pooled_keys(key, ranges, grid.block_size, scale)
    lines = batch * heads * grid.q_blocks
    at_once = min(lines, max(1, SCORE_BYTES // (4 * grid.kv_blocks)))
    scores = torch.empty(at_once, grid.kv_blocks, dtype=torch.float32, device=query.device)
    best = torch.empty(at_once, dtype=torch.float32, device=query.device)
    for first in range(0, lines, at_once):
        part = scores[: lines - first]
        block_scores(query, keys, ranges, part, best, grid, first)
        write_rows(ranges, part, best, lists, grid, config, first, all_partial=all_partial, zero_tails=zero_tails)
    return lists
