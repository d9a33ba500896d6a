"""What the selectors' operators have in common."""

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def traced_lists(query: Tensor, key: Tensor, block_size: int) -> Lists:
    """What tracing sees of a selector's results: the four index tensors and js_distance, unwritten."""
    batch, heads, q_len, _ = query.shape
    rows, columns = cdiv(q_len, block_size), cdiv(key.shape[2], block_size)
    count = query.new_empty((batch, heads, rows), dtype=torch.int32)
    indices = query.new_empty((batch, heads, rows, columns), dtype=torch.int32)
    return (
        count,
        indices,
        torch.empty_like(count),
        torch.empty_like(indices),
        query.new_empty((batch, heads), dtype=torch.float32),
    )
