"""The settings of FlexPrefill (Lai et al., ICLR 2025, arXiv 2502.20766)."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.density import fixed_density, usual_density
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.flexprefill import reference
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.validation import check_block_size, check_integer, check_number

Variant = Literal["published", "paper"]
VARIANTS = get_args(Variant)


@dataclass(frozen=True)
class FlexPrefillConfig(Selector, name="flexprefill"):
    """How much attention to keep and how to look for it.

    Args:
        gamma: share of the attention probability to cover, in (0, 1]. With `max_budget=None`, 1 keeps every block.
        tau: Jensen-Shannon distance below which a head is query-aware, in [0, 1]; 0 makes every head vertical-slash.
        min_budget: tokens that every query row keeps at least (at least 1).
        max_budget: tokens that a row keeps at most, None for no limit; at least max(min_budget, 3 * block_size).
        block_size: tokens per block, 64 or 128.
        variant: "published" selects what the authors' released code selects; "paper" follows the printed algorithms.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    diagnostics = ("js_distance",)
    triton = "flexprefill_fa.masks.flexprefill.kernels:select"
    sweep = {"gamma": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)}  # noqa: RUF012

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    variant: Variant = "published"

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, 0, 1, open_low=True)
        check_number("tau", self.tau, 0, 1)
        check_block_size(self.block_size)
        check_integer("min_budget", self.min_budget, 1)
        if self.max_budget is not None:
            check_integer("max_budget", self.max_budget, 1)
            least = max(self.min_budget, 3 * self.block_size)
            if self.max_budget < least:
                raise ValueError(
                    f"max_budget must be at least max(min_budget, 3 * block_size) = {least}, got {self.max_budget}"
                )
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens keep every block."""
        return max(2 * self.block_size, cdiv(self.min_budget, self.block_size) * self.block_size)

    @property
    def keeps_everything(self) -> bool:
        """True when every prompt keeps every causal block, by definition (an fp32 sum reaches 1.0 too early)."""
        return self.gamma >= 1 and self.max_budget is None

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks that a prompt of this length usually comes to, in [0, 1].

        What is usual is known for a gamma near 0.95; for one below 0.9 it is what the budgets keep in any case.
        """
        if self.keeps_everything:
            return 1.0
        usual = usual_density(tokens) if self.gamma >= 0.9 else 0.0
        blocks = cdiv(tokens, self.block_size)

        def of_budget(budget: int) -> float:  # as many columns as diagonals
            return fixed_density(blocks, 2 * cdiv(budget, self.block_size))

        most = 1.0 if self.max_budget is None else of_budget(self.max_budget)
        return max(min(usual, most), of_budget(self.min_budget))

    def keep(self, element: Element) -> Tensor:
        """Steps 1 to 5, see `reference`."""
        return reference.keep(element, self)
