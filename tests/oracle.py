"""fp64 attention over selected blocks, on any device, and the loss that low precision alone causes."""

import torch
from torch import Tensor

from flexprefill_fa.selection import BlockSelection


def causal_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection | None,
    *,
    offset: int = 0,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(fp64 output, the same with probabilities and values in the inputs' precision, real rows) over selected blocks.

    Outputs are [B, Hq, Lq, D]; real rows are bool [B, 1, Lq, 1]. Without a selection: dense, with offset and ranges.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if selection is not None:
        offset, ranges = selection.grid.offset, selection.ranges
    assert ranges is not None
    q_position = offset + torch.arange(q_len, device=query.device)
    kv_position = torch.arange(kv_len, device=query.device)
    start, end = ranges[:, :1], ranges[:, 1:]
    mask = (kv_position <= q_position[:, None]) & ((kv_position >= start) & (kv_position < end))[:, None]
    mask = mask[:, None].expand(-1, query.shape[1], -1, -1)
    if selection is not None:
        size = selection.block_size
        keep = selection.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
        mask = mask & keep[:, :, :q_len, :kv_len]
    real = ((q_position >= start) & (q_position < end))[:, None, :, None]
    groups = query.shape[1] // key.shape[1]

    def attend(scores_in: torch.dtype, values_in: torch.dtype) -> Tensor:
        q, k = query.to(scores_in), key.to(scores_in).repeat_interleave(groups, 1)
        scores = (q @ k.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        probability = scores.softmax(-1).nan_to_num(0.0).to(values_in)
        return probability @ value.to(values_in).repeat_interleave(groups, 1)

    return attend(torch.float64, torch.float64), attend(torch.float32, query.dtype), real


def relative_error(got: Tensor, expected: Tensor, real: Tensor) -> float:
    """Relative L2 error over the real rows."""
    difference = ((got.double() - expected.double()) * real).norm()
    return (difference / (expected.double() * real).norm()).item()
