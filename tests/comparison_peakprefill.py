"""The comparison of a PeakPrefill selection with the oracle's, block for block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from oracle_peakprefill import CLUSTER_SHIFT, CLUSTER_TIE, PeakOracle, count_of, oracle_select, represent
from torch import Tensor

from flexprefill_fa import BlockSelection, PeakPrefillConfig
from flexprefill_fa.grid import Grid
from flexprefill_fa.masks.element import element_of
from flexprefill_fa.masks.peakprefill.reference import peak_shares

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
        f"{[float(oracle.peaks[tuple(cell)]) for cell in wrong[:5]]}, margins "
        f"{[float(oracle.margin[tuple(cell)]) for cell in wrong[:5]]}, {what}"
    )
    decided = torch.from_numpy(oracle.by_score)
    return Counts(int(decided.sum()), int((decided & keep).sum()), int((~clear).sum()))


def explained(query: Tensor, key: Tensor, config: PeakPrefillConfig, ranges: Tensor, unequal: Tensor) -> Tensor:
    """bool `[B, Hq, nq, nk]`: where a near tie may turn a cell, without an oracle of all; tied keys only where unequal.

    X comes near the peak, by the plain rule on the tensors' device; or distances tie among the keys of the cell's
    block, and X is within e^CLUSTER_SHIFT of the peak, or of another block of the row, and it is within 2 percent.
    """
    near = torch.zeros_like(unequal)
    grid, size = Grid(query.shape[2], key.shape[2], config.block_size), config.block_size
    scale = query.shape[-1] ** -0.5

    def tied(b: int, head: int, block: int) -> bool:
        keys = key[b, head, block * size : (block + 1) * size].double().cpu().numpy()
        return bool(represent(keys, config.representatives, count_of(key.shape[2], config.per_block)).gap < CLUSTER_TIE)

    for b, (start, end) in enumerate(ranges.tolist()):
        found = element_of(query[b], key[b], start, end, grid, scale)
        if found is None:  # all its queries are padding
            continue
        element, rows, columns = found
        apart = (peak_shares(element, config).log() - math.log(config.peak)).abs()
        sizes = scale * element.query.float().norm(dim=-1).amax(-1) * element.key.float().norm(dim=-1).amax()  # [Hq]
        near[b, :, rows, columns] = apart < NEAR_TIE[query.dtype] * (1 + sizes[:, None, None])
        for h, i, j in (unequal[b] & ~near[b]).nonzero().tolist():
            gap, place = apart[h, i - rows.start, j - columns.start], (b, h // element.groups)
            own = (grid.offset + i * size) // size
            near[b, h, i, j] = (gap < CLUSTER_SHIFT and tied(*place, j)) or bool(
                gap < 0.02 and any(tied(*place, block) for block in range(columns.start + 1, own))
            )
    return near
