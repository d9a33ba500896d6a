"""What share of the causal blocks a selector may be expected to keep, before it has run."""

import math
from collections.abc import Sequence
from itertools import pairwise

# Mean densities of language models' heads at the published settings, as other work reports them.
_USUAL_DENSITY = (
    (2048, 1.0),
    (4096, 0.76),
    (8192, 0.54),
    (16384, 0.34),
    (32768, 0.19),
    (65536, 0.09),
    (131072, 0.046),
    (262144, 0.025),
)


def usual_density(tokens: int, densities: Sequence[tuple[int, float]] = _USUAL_DENSITY) -> float:
    """What dynamic selectors come to at this prompt length; constant beyond the ends of the table (tokens, density)."""
    at = math.log2(max(tokens, 1))
    points = [(math.log2(length), math.log2(density)) for length, density in densities]
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1:
            return 2.0 ** (y0 + (y1 - y0) * max(at - x0, 0.0) / (x1 - x0))
    return densities[-1][1]


def fixed_density(blocks: int, per_row: int, full_rows: int = 0) -> float:
    """Density where each row keeps `per_row` of the blocks that it sees, or all if it sees fewer.

    Args:
        blocks: key blocks of a whole prompt, and row blocks.
        per_row: blocks that a row keeps.
        full_rows: rows at the end that keep all they see.
    """
    short = max(0, min(blocks - full_rows, per_row))  # rows that see no more than per_row blocks
    middle = max(0, blocks - full_rows - per_row)
    last = min(full_rows, blocks)
    kept = short * (short + 1) // 2 + middle * per_row + last * (2 * blocks - last + 1) // 2
    return kept / (blocks * (blocks + 1) // 2)
