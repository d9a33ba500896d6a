"""Vertical-slash attention with fixed budgets: the columns and diagonals that the last queries attend to most.

FlexPrefill's published ranking, with the same number of columns and of diagonals in every head and at every length: the
baseline that it was compared with.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.masks.density import fixed_density
from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.last_queries import last_query_scores, top
from flexprefill_fa.masks.selector import Lists, Selector
from flexprefill_fa.validation import check_block_size, check_integer


@dataclass(frozen=True)
class VerticalSlashConfig(Selector, name="vertical_slash"):
    """How many columns and diagonals every head keeps.

    Args:
        vertical_size: keys that every row keeps, in tokens, rounded up to blocks (at least 1). The first block of
            the prompt is always among them.
        slash_size: offsets that every row keeps, in tokens, rounded up to blocks (at least 1). The main diagonal is
            always among them.
        block_size: tokens per block, 64 or 128.

    Raises:
        ValueError, TypeError: for a value outside its range.
    """

    triton = "flexprefill_fa.masks.vertical_slash:select_by_triton"
    sweep = dict.fromkeys(("vertical_size", "slash_size"), (128, 512, 1024, 2048, 4096, 8192))

    vertical_size: int = 8192
    slash_size: int = 8192
    block_size: int = 128

    def __post_init__(self) -> None:
        check_integer("vertical_size", self.vertical_size, 1)
        check_integer("slash_size", self.slash_size, 1)
        check_block_size(self.block_size)

    @property
    def columns(self) -> int:
        """Key blocks that every row keeps."""
        return cdiv(self.vertical_size, self.block_size)

    @property
    def diagonals(self) -> int:
        """Block diagonals that every row keeps."""
        return cdiv(self.slash_size, self.block_size)

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens keep every block, as columns or as diagonals."""
        return max(self.columns, self.diagonals) * self.block_size

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks of a whole prompt of this length, in [0, 1], where no columns meet diagonals."""
        return fixed_density(cdiv(tokens, self.block_size), self.columns + self.diagonals)

    def keep(self, element: Element) -> Tensor:
        """The top columns and diagonals; a single query keeps all it sees."""
        nb = element.grid.kv_blocks
        if element.grid.queries == 1:
            return element.visible().expand(element.heads, -1, -1)
        vertical, slash = last_query_scores(element)
        # Offsets are grouped from the far end, which misaligns them with the blocks when n is no multiple of B.
        column_scores, diagonal_scores = element.block_sums(vertical), element.block_sums(slash.flip(1)).flip(1)
        column_scores[:, 0] = diagonal_scores[:, 0] = float("inf")
        number = torch.full_like(column_scores[:, 0], self.columns, dtype=torch.int64)
        columns = top(column_scores, number)  # [H, nb]
        diagonals = top(diagonal_scores, torch.full_like(number, self.diagonals))  # by blocks below the main one
        keep = columns[:, None].expand(-1, element.grid.q_blocks, -1)
        blocks = torch.arange(nb, device=element.device)
        for diagonal in element.diagonal():
            below = diagonal[:, None] - blocks  # [nq, nb]
            keep = keep | (diagonals[:, below.clamp(0, nb - 1)] & (below >= 0))
        return keep


def select_by_triton(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: VerticalSlashConfig,
    scale: float | None = None,
    all_partial: bool = False,
    zero_tails: bool = False,
) -> Lists:
    """The same by Triton kernels; entries past the counts are unwritten unless zero_tails."""
    from flexprefill_fa.kernels.last_query import last_query_scores
    from flexprefill_fa.kernels.line_rows import write_line_rows
    from flexprefill_fa.kernels.merge import merge_parts
    from flexprefill_fa.kernels.outputs import empty_lists, prepare
    from flexprefill_fa.kernels.pooling import block_mean
    from flexprefill_fa.kernels.top_lines import choose

    query, key, grid, ranges = prepare(query, key, starts, lengths, config.block_size)
    batch, heads, _, dim = query.shape
    size = config.block_size
    scale = 1 / math.sqrt(dim) if scale is None else scale
    parts = last_query_scores(query, key, ranges, size, scale)
    mean_key = block_mean(key, ranges, 0, size)
    scores = merge_parts(parts, mean_key, ranges, heads=heads, block_size=size, scale=scale)
    counts = torch.empty(2, batch * heads, dtype=torch.int32, device=query.device)
    for kind, number in enumerate((config.columns, config.diagonals)):
        counts[kind].fill_(min(number, grid.kv_blocks))
    chosen = choose(scores.columns, scores.diagonals, counts, ranges, heads=heads, block_size=size)
    lists = empty_lists(batch, heads, grid, query.device)
    write_line_rows(
        ranges, None, chosen, None, None, lists, grid, dense_tokens=0, dense=False, all_partial=all_partial,
        zero_tails=zero_tails,
    )  # fmt: skip
    return lists
