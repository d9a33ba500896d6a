"""CoSA's selection (arXiv 2607.25291): key blocks that hold some query group's maximum first, then by their sums.

    P[r, J] = exp(max over c in J of X[r, c] - max over c of X[r, c])

with X of masks/antidiagonals.py. Its attention, which reuses selections, is not here. In plain PyTorch on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.masks.antidiagonals import antidiagonal_scores, check_stride, share_prefix
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.validation import check_block_size, check_number

_MAXIMUM = 0.999  # of P, from which a block holds a group's maximum


@dataclass(frozen=True)
class CoSAConfig(Selector, name="cosa"):
    """How much of the summed P every query block keeps.

    Args:
        share: p, of the sum of P over a query block, in (0, 1]; published are 0.8 to 0.95, and 1 keeps every block.
        stride: queries and keys of a group, in tokens, a divisor of the block size; published is 8.
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    sweep = {"share": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)}  # noqa: RUF012

    share: float = 0.9
    stride: int = 8
    block_size: int = 128

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1, open_low=True)
        check_block_size(self.block_size)
        check_stride(self.stride, self.block_size)

    def keep(self, element: Element) -> Tensor:
        """The shortest prefix of each query block's key blocks: those with a maximum, then the others, by sums of P."""
        parts = []
        for scores, real in antidiagonal_scores(element, self.stride):
            highest = scores.amax(-1)  # [H, i, r, nk]
            relative = (highest - highest.amax(-1, keepdim=True)).exp_()
            relative = relative if real is None else relative * real[..., None]
            before = (relative >= _MAXIMUM).any(2)
            parts.append(share_prefix(relative.sum(2), self.share, before))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
