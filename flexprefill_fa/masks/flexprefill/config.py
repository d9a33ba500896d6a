"""The settings of FlexPrefill (Lai et al., ICLR 2025, arXiv 2502.20766)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.density import fixed_density, usual_density
from flexprefill_fa.validation import check_block_size, check_integer, check_number

VARIANTS = ("published", "paper")


@dataclass(frozen=True)
class FlexPrefillConfig:
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

    name: ClassVar[str] = "flexprefill"

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    variant: str = "published"

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

    def settings(self) -> Tensor:
        """The numbers as float64 [5] on the CPU, the form the operator takes."""
        return torch.tensor(
            [
                self.gamma,
                self.tau,
                self.min_budget,
                -1 if self.max_budget is None else self.max_budget,
                VARIANTS.index(self.variant),
            ],
            dtype=torch.float64,
            device="cpu",
        )

    def operator(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The operator that runs the selection, see `select_flexprefill`."""
        from flexprefill_fa.masks.flexprefill.op import select_flexprefill  # the operator needs this class

        return select_flexprefill

    @classmethod
    def from_settings(cls, settings: Tensor, block_size: int) -> "FlexPrefillConfig":
        """The inverse of `settings`."""
        gamma, tau, min_budget, max_budget, variant = settings.tolist()
        return cls(
            gamma=gamma,
            tau=tau,
            min_budget=int(min_budget),
            max_budget=None if max_budget < 0 else int(max_budget),
            block_size=block_size,
            variant=VARIANTS[int(variant)],
        )
