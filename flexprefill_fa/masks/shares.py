"""What a rule compares with its threshold, block by block: for those who ask why a block was kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockShares:
    """The share that a rule gives each block.

    Attributes:
        share: fp32 `[H, nq, nk]` in [0, 1], without meaning for blocks that a query block does not see.
        what: of what, in words, to come after "share".
        threshold: the field of the selector's config that a share must reach.
        row: int64 `[H, nq, nk]`, the row of the query block that gives the block this share; None where the rule looks
            at all rows together.
        representative: int64 like it, the number of the representative through which that row sees the block, from 1;
            0: by all of its keys; None where there are no representatives.
    """

    share: Tensor
    what: str
    threshold: str
    row: Tensor | None = None
    representative: Tensor | None = None
