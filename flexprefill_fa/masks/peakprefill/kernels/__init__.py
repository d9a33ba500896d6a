"""PeakPrefill's selection in Triton: representatives of the keys, then one program per query block does all the rest.

Two or three kernels, no host synchronisation, and little memory besides the lists: R / B of the keys' bytes.
"""

import math

import torch
from torch import Tensor

from flexprefill_fa.autocast import without_autocast
from flexprefill_fa.kernels.outputs import empty_lists, prepare
from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig
from flexprefill_fa.masks.peakprefill.kernels.representatives import represent
from flexprefill_fa.masks.peakprefill.kernels.rows import write_rows
from flexprefill_fa.masks.selector import select_plain


def select(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: PeakPrefillConfig,
    scale: float | None = None,
    all_partial: bool = False,
    zero_tails: bool = False,
) -> tuple[Tensor, ...]:
    """The same as the rule in `reference`; entries past the counts are unwritten unless zero_tails.

    fp32 with a head dim above 128, whose tiles do not fit in shared memory, goes by that rule, which waits for the
    device where there is padding.

    Raises:
        ValueError: for more key blocks than the row writer can count.
    """
    if query.dtype == torch.float32 and query.shape[3] > 128:
        with without_autocast(query.device.type):
            return select_plain(query, key, starts, lengths, config, scale, all_partial)
    query, key, grid, ranges = prepare(query, key, starts, lengths, config.block_size)
    batch, heads, _, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    lists = empty_lists(batch, heads, grid, query.device)
    seen = represent(query, key, ranges, grid, config, scale)
    write_rows(query, key, seen, ranges, lists, grid, config, scale, all_partial=all_partial, zero_tails=zero_tails)
    return lists
