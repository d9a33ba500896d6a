"""The settings of PeakPrefill."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flexprefill_fa.masks.density import usual_density
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.peakprefill import reference
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.masks.shares import BlockShares
from flexprefill_fa.validation import check_block_size, check_integer, check_number

MOST_REPRESENTATIVES = 16
# Of two language models' heads up to 32,768 tokens and of a needle model's beyond, at a peak of 0.2.
_DENSITIES = (
    (512, 1.0),
    (2048, 0.5),
    (4096, 0.30),
    (8192, 0.18),
    (16384, 0.10),
    (32768, 0.055),
    (65536, 0.023),
    (131072, 0.012),
    (262144, 0.006),
)


@dataclass(frozen=True)
class PeakPrefillConfig(Selector, name="peakprefill"):
    """Which share of one query's attention a key block must hold, and how closely its keys are looked at.

    Published rules keep the blocks that hold most of a query block's mean attention; a block that one row in 128 needs
    holds at most 1/128 of that. This one asks each row. The method and its measurements: docs/peakprefill.md.

    Args:
        peak: a query block keeps a key block to which some row of it gives at least this share, in (0, 1).
        representatives: "clusters" of a block's keys, or its "outliers" by themselves and the mean of the rest.
        per_block: representatives of a key block, from 1 to 16; None: 8 for up to 65,536 positions, padding
            included, and 4 for more.
        variance: whether a representative also stands for how far its keys lie from it.
        last_full_blocks: last query blocks with a real query, which keep all they see (at least 0).
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    triton = "flexprefill_fa.masks.peakprefill.kernels:select"
    sweep = {"peak": (0.6, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125)}  # noqa: RUF012

    peak: float = 0.2
    representatives: Literal["clusters", "outliers"] = "clusters"
    per_block: int | None = None
    variance: bool = True
    last_full_blocks: int = 1
    block_size: int = 128

    def __post_init__(self) -> None:
        check_number("peak", self.peak, 0, 1, open_low=True, open_high=True)
        if self.representatives not in ("clusters", "outliers"):
            raise ValueError(f"representatives must be 'clusters' or 'outliers', got {self.representatives!r}")
        if self.per_block is not None:
            check_integer("per_block", self.per_block, 1, MOST_REPRESENTATIVES)
        if not isinstance(self.variance, bool):
            raise TypeError(f"variance must be True or False, got {self.variance!r}")
        check_integer("last_full_blocks", self.last_full_blocks, 0)
        check_block_size(self.block_size)

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens keep every block: there are no others than those kept in any case."""
        return (2 + self.last_full_blocks) * self.block_size

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks that a prompt of this length usually comes to, in [0, 1].

        Twice as many where the peak is a quarter, as was measured from 0.05 to 0.4.
        """
        if tokens <= self.dense_tokens:
            return 1.0
        return min(1.0, usual_density(tokens, _DENSITIES) * (0.2 / self.peak) ** 0.5)

    def keep(self, element: Element) -> Tensor:
        """Blocks with a share of `peak` for some row, see `reference`."""
        return reference.peak_shares(element, self) >= self.peak

    def clauses(self, element: Element) -> dict[str, Tensor]:
        """The first block, a row's own positions, the last rows."""
        return {**super().clauses(element), "last query blocks": element.last_rows(self.last_full_blocks)}

    def block_shares(self, element: Element) -> BlockShares:
        """The largest share that a row gives each block, see `reference`."""
        return reference.block_shares(element, self)
