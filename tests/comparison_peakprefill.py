"""The comparison of a PeakPrefill selection with the oracle's, block for block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from oracle_peakprefill import PeakOracle, oracle_select
from torch import Tensor

from flexprefill_fa import BlockSelection, PeakPrefillConfig

# ln X that comes closer to ln peak, relatively to the scores' size, may fall on either side in fp32; with rounded
# representatives a mean between two numbers of the inputs' dtype may become either.
NEAR_TIE = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@dataclass
class Counts:
    """Cells that X alone decides, those of them that are kept, and those that a near tie may turn."""

    decided: int = 0
    kept: int = 0
    near: int = 0

    def add(self, other: Counts) -> None:
        self.decided, self.kept, self.near = (
            self.decided + other.decided,
            self.kept + other.kept,
            self.near + other.near,
        )


def ask_oracle(
    query: Tensor,
    key: Tensor,
    config: PeakPrefillConfig,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> PeakOracle:
    return oracle_select(query, key, **asdict(config), starts=starts, lengths=lengths, scale=scale)


def compare(selection: BlockSelection, oracle: PeakOracle, dtype: torch.dtype, what: object = "") -> Counts:
    """Every cell but near ties must be the oracle's."""
    clear = torch.from_numpy(oracle.margin) >= NEAR_TIE[dtype]
    expected, keep = torch.from_numpy(oracle.keep), selection.to_dense()
    wrong = ((keep != expected) & clear).nonzero().tolist()
    assert not wrong, (
        f"{len(wrong)} cells differ from the oracle, {wrong[:5]}: X "
        f"{[float(oracle.norms[tuple(cell)]) for cell in wrong[:5]]}, margins "
        f"{[float(oracle.margin[tuple(cell)]) for cell in wrong[:5]]}, {what}"
    )
    decided = torch.from_numpy(oracle.by_score)
    return Counts(int(decided.sum()), int((decided & keep).sum()), int((~clear).sum()))
