"""The settings of FlashPrefill (arXiv 2603.06199)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.density import fixed_density, usual_density
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.flashprefill import reference
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.masks.shares import BlockShares
from flexprefill_fa.validation import check_block_size, check_integer, check_number


@dataclass(frozen=True)
class FlashPrefillConfig(Selector, name="flashprefill"):
    """How near a block must come to the best of its row, and what is kept in any case.

    Args:
        alpha: share of the row's largest block score that a block must reach, in (0, 1]. Published per model: 0.18 for
            Llama-3.1-8B, 0.08 for Qwen2-7B and Qwen2.5-7B, 0.12 for Qwen3-30B-A3B.
        sink_blocks: first blocks with a real key that every row keeps, in blocks (at least 0).
        window_blocks: blocks up to the diagonal that every row keeps, the diagonal included (at least 1). A window
            larger than the prompt keeps all of it.
        last_full_blocks: last query blocks with a real query, which keep all they see (at least 0).
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    triton = "flexprefill_fa.masks.flashprefill.kernels:select"
    sweep = {"alpha": (0.7, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01)}  # noqa: RUF012

    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_full_blocks: int = 2
    block_size: int = 128

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0, 1, open_low=True)
        check_integer("sink_blocks", self.sink_blocks, 0)
        check_integer("window_blocks", self.window_blocks, 1)
        check_integer("last_full_blocks", self.last_full_blocks, 0)
        check_block_size(self.block_size)

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens, padding and prefix counted, keep every block.

        Exact: a longer whole prompt has a block that only its score can keep.
        """
        return (self.sink_blocks + self.window_blocks + self.last_full_blocks) * self.block_size

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks that a prompt of this length usually comes to, in [0, 1].

        No less than what is kept in any case. Reported for the published values of alpha; others are not told apart.
        """
        always = fixed_density(
            cdiv(tokens, self.block_size), self.sink_blocks + self.window_blocks, self.last_full_blocks
        )
        return max(always, usual_density(tokens))

    def keep(self, element: Element) -> Tensor:
        """Blocks that come near the best of their row, see `reference`."""
        scores = reference.block_scores(element)
        return (scores > 0) & (scores >= scores.amax(-1, keepdim=True) * self.alpha)

    def clauses(self, element: Element) -> dict[str, Tensor]:
        """Sink blocks, window blocks, last rows."""
        block = torch.arange(element.grid.kv_blocks, device=element.device)
        return {
            "sink blocks": (block < self.sink_blocks)[None],
            "window": element.diagonal()[0][:, None] - block < self.window_blocks,
            "last query blocks": element.last_rows(self.last_full_blocks),
        }

    def block_shares(self, element: Element) -> BlockShares:
        """Scores beside the best one of their row."""
        scores = reference.block_scores(element)
        best = scores.amax(-1, keepdim=True)
        return BlockShares((scores / best).nan_to_num(nan=0.0), "of the best block's score", "alpha")
