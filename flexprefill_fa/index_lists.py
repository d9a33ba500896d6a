"""Index lists of kept blocks: from tables of flags and back, and both lists of a selection in one tensor.

A selector's operator returns three tensors: `kv_num_blocks`, `full_kv_num_blocks` int32 `[B, Hq, nq]`, and indices
int32 `[B, Hq, nq, PARTIAL + nk]`, whose row holds the partial list from column 0 and the full list from column PARTIAL.
`both_lists` makes FlexAttention's four tensors of them. With `all_partial` the full list is empty and the partial list
takes the whole row.

PARTIAL columns are enough. A row begins at position f, and its last real query stands at l, with l <= f + B - 1 and
l < end. A block J that l sees, J B <= l, is partial in one of three cases:

- The causal boundary crosses it, J B + B - 1 > f. Then J B is one of the 2 B - 2 positions f - B + 2 to f + B - 1, of
  which at most two are multiples of B.
- The real keys start inside, J B < start < J B + B: one block.
- They end inside, J B + B > end. Then J B + B - 1 >= end > f: it is one of the first case.

So a row has at most three. A fourth column keeps the full list, like the partial one, at a multiple of 16 bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PARTIAL = 4


def both_lists(found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices of what a selector's operator found.

    The indices are views `[B, Hq, nq, nk]` of one tensor, with the same strides; an entry past the count of one may be
    the other's.
    """
    count, full_count, indices = found[:3]
    return count, indices[..., :-PARTIAL], full_count, indices[..., PARTIAL:]


def index_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending index lists of a bool `[B, H, nq, nk]`: counts int32 `[B, H, nq]`, indices int32 `[B, H, nq, nk]`.

    Entries past a row's count are 0.
    """
    count = keep.sum(-1, dtype=torch.int32)
    width = keep.shape[-1]
    columns = torch.arange(width, dtype=torch.int32, device=keep.device)
    indices = torch.where(keep, columns, width).sort(-1).values  # kept columns first, the rest behind them
    return count, indices.remainder_(width).contiguous()  # a rule may return any strides


def shared_lists(partial: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a selector's operator returns for bool `[B, H, nq, nk]` each, at most PARTIAL partial blocks in a row.

    Without full, every block is partial. Entries of neither list are 0.
    """
    count, indices = index_lists(partial)
    if full is None:
        return count, torch.zeros_like(count), F.pad(indices, (0, PARTIAL))
    full_count, full_indices = index_lists(full)
    first = F.pad(indices, (0, PARTIAL))[..., :PARTIAL]  # there may be fewer columns
    return count, full_count, torch.cat((first, full_indices), -1)


def scatter_lists(count: Tensor, indices: Tensor, width: int) -> Tensor:
    """The inverse of `index_lists`; what lies past the counts may be uninitialised."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    dense = torch.zeros(*count.shape, width + 1, dtype=torch.bool, device=indices.device)
    dense.scatter_(-1, torch.where(valid, indices, width).long(), True)
    return dense[..., :width].contiguous()


@torch.library.custom_op("flexprefill_fa::kept_table", mutates_args=())
def kept_table(
    kv_num_blocks: Tensor, kv_indices: Tensor, full_kv_num_blocks: Tensor, full_kv_indices: Tensor, width: int
) -> Tensor:
    """bool `[B, Hq, nq, width]`: True where a block is in either list.

    An operator, because FlexAttention wants the tensors that a mask_mod captures in memory.
    """
    return scatter_lists(kv_num_blocks, kv_indices, width) | scatter_lists(full_kv_num_blocks, full_kv_indices, width)


@kept_table.register_fake
def _(
    kv_num_blocks: Tensor, kv_indices: Tensor, full_kv_num_blocks: Tensor, full_kv_indices: Tensor, width: int
) -> Tensor:
    return kv_num_blocks.new_empty((*kv_num_blocks.shape, width), dtype=torch.bool)
