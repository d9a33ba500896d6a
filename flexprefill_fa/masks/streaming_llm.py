"""StreamingLLM's pattern (arXiv 2309.17453): the first tokens and a sliding window, the same in every head.

It looks at no query and no key: geometry alone, in plain tensor operations on the inputs' device, without waiting.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv
from flexprefill_fa.masks.density import fixed_density
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.validation import check_block_size, check_integer


@dataclass(frozen=True)
class StreamingLLMConfig(Selector, name="streaming_llm"):
    """How many tokens every query sees: a block is kept when one of its pairs is.

    Args:
        sink: first real tokens of the prompt, in tokens (at least 0).
        window: latest tokens, the query's own included, in tokens (at least 1); one larger than the prompt keeps all.
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    sweep = {"window": (128, 512, 1024, 2048, 4096, 8192)}  # noqa: RUF012

    sink: int = 128
    window: int = 2048
    block_size: int = 128

    def __post_init__(self) -> None:
        check_integer("sink", self.sink, 0)
        check_integer("window", self.window, 1)
        check_block_size(self.block_size)

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens keep every block. Conservative: whole blocks may hold some more."""
        return self.sink + self.window

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks of a whole prompt of this length, in [0, 1]."""
        size = self.block_size
        # A row's window reaches back window - 1 tokens from its first query, which stands at the start of a block.
        per_row = cdiv(self.sink, size) + 1 + cdiv(self.window - 1, size)
        return fixed_density(cdiv(tokens, size), per_row)

    def pattern(self, grid: Grid, ranges: Tensor) -> Tensor:
        """Blocks with a real query q and a real key k <= q with k < start + sink or q - k < window."""
        start = ranges[:, 0].long()[:, None, None]
        row_first = grid.offset + torch.arange(grid.q_blocks, device=ranges.device)[:, None] * grid.block_size
        sink, window = self._parts(torch.maximum(row_first, start), start, grid.kv_blocks)
        return sink | window

    def clauses(self, element: Element) -> dict[str, Tensor]:
        """The two of them."""
        first_query = element.row_first.clamp(min=element.grid.offset)[:, None]
        parts = self._parts(first_query, element.grid.key_pad, element.grid.kv_blocks)
        return dict(zip(("sink", "window"), parts, strict=True))

    def _parts(self, first_query: Tensor, start: Tensor | int, blocks: int) -> tuple[Tensor, Tensor]:
        """Sink and window, bool `[..., nq or 1, nk]`; from positions: each row's first real query, the first key."""
        block_first = torch.arange(blocks, device=first_query.device) * self.block_size  # [nk]
        block_last = block_first + self.block_size - 1
        sink = (block_first < start + self.sink) & (self.sink > 0)
        return sink, block_last > first_query - self.window  # up to the diagonal: the rows' windows overlap
