"""XAttention (arXiv 2503.16428): per query block, the fewest key blocks that hold a share of antidiagonal attention.

    A[I, J] = sum over the query groups r of I and the key groups c of J of softmax_c X[r, c]

with X of masks/antidiagonals.py. In plain PyTorch on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.masks.antidiagonals import antidiagonal_scores, check_stride, share_prefix
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.validation import check_block_size, check_number


@dataclass(frozen=True)
class XAttentionConfig(Selector, name="xattention"):
    """How much of the antidiagonals' attention every query block keeps.

    Args:
        threshold: share of a query block's sum, in (0, 1]; 1 keeps every block.
        stride: queries and keys of a group, in tokens, a divisor of the block size; published are 8 and 16.
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    sweep = {"threshold": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)}  # noqa: RUF012

    threshold: float = 0.9
    stride: int = 8
    block_size: int = 128

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, 1, open_low=True)
        check_block_size(self.block_size)
        check_stride(self.stride, self.block_size)

    def keep(self, element: Element) -> Tensor:
        """The shortest prefix of each query block's key blocks, by A."""
        parts = []
        for scores, real in antidiagonal_scores(element, self.stride):
            shares = scores.flatten(3).softmax(-1).view(scores.shape).sum(-1)  # [H, i, r, nk]
            shares = shares if real is None else shares * real[..., None]
            parts.append(share_prefix(shares.sum(2), self.threshold))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
