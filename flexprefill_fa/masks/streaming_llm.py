"""StreamingLLM's pattern (arXiv 2309.17453): the first tokens and a sliding window, the same in every head.

It looks at no query and no key: geometry alone, in plain tensor operations on the inputs' device, without waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv, real_ranges, unmasked_blocks, visible_blocks
from flexprefill_fa.masks.density import fixed_density
from flexprefill_fa.masks.operator import Lists, select_operator
from flexprefill_fa.selection import index_lists
from flexprefill_fa.validation import check_block_size, check_integer


@dataclass(frozen=True)
class StreamingLLMConfig:
    """How many tokens every query sees: a block is kept when one of its pairs is.

    Args:
        sink: first real tokens of the prompt, in tokens (at least 0).
        window: latest tokens, the query's own included, in tokens (at least 1); one larger than the prompt keeps all.
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    name: ClassVar[str] = "streaming_llm"

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

    def settings(self) -> Tensor:
        """The numbers as float64 [2] on the CPU, the form the operator takes."""
        return torch.tensor([self.sink, self.window], dtype=torch.float64, device="cpu")

    def operator(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The operator that runs the selection, see `select_streaming_llm`."""
        return select_streaming_llm

    @classmethod
    def from_settings(cls, settings: Tensor, block_size: int) -> "StreamingLLMConfig":
        """The inverse of `settings`."""
        return cls(*map(int, settings.tolist()), block_size=block_size)


def kept_blocks(grid: Grid, ranges: Tensor, config: StreamingLLMConfig) -> Tensor:
    """bool `[B, nq, nk]`: blocks with a real query q and a real key k <= q with k < start + sink or q - k < window."""
    start = ranges[:, 0].long()[:, None, None]
    row_first = grid.offset + torch.arange(grid.q_blocks, device=ranges.device)[:, None] * grid.block_size
    first_query = torch.maximum(row_first, start)  # [B, nq, 1], of the row's real ones
    block_first = torch.arange(grid.kv_blocks, device=ranges.device) * grid.block_size  # [nk]
    block_last = block_first + grid.block_size - 1
    sink = (block_first < start + config.sink) & (config.sink > 0)
    window = block_last > first_query - config.window  # up to the diagonal: the rows' windows overlap
    return (sink | window) & visible_blocks(grid, ranges)


def select(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: StreamingLLMConfig,
    scale: float | None = None,
    all_partial: bool = False,
) -> Lists:
    """The selection, see `select_operator`. No score is computed."""
    batch, heads = query.shape[:2]
    grid = Grid(query.shape[2], key.shape[2], config.block_size)
    ranges = real_ranges(starts, lengths, batch, grid.kv_len, query.device)
    keep = kept_blocks(grid, ranges, config)
    full = keep & unmasked_blocks(grid, ranges) & (not all_partial)
    lists = []
    for blocks in (keep & ~full, full):
        count, indices = index_lists(blocks[:, None])
        # Memory of their own: `contiguous` would return the same tensor where there is one head.
        lists += [count.repeat(1, heads, 1), indices.repeat(1, heads, 1, 1)]
    return lists[0], lists[1], lists[2], lists[3], torch.zeros(batch, heads, device=query.device)


select_streaming_llm = select_operator(StreamingLLMConfig.name, StreamingLLMConfig, select, None)
