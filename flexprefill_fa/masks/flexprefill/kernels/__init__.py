"""FlexPrefill's selection in Triton: no host synchronisation, no loop over heads, bitwise repeatable."""

import math

from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.kernels.coverage import Prefix, coverage
from flexprefill_fa.kernels.last_query import last_query_scores
from flexprefill_fa.kernels.line_rows import write_line_rows
from flexprefill_fa.kernels.merge import merge_parts
from flexprefill_fa.kernels.outputs import empty_lists, prepare
from flexprefill_fa.kernels.pooling import block_mean
from flexprefill_fa.kernels.top_lines import CoverageBudget, choose
from flexprefill_fa.masks.flexprefill.config import FlexPrefillConfig
from flexprefill_fa.masks.flexprefill.kernels import paper
from flexprefill_fa.masks.flexprefill.kernels.pattern import head_pattern
from flexprefill_fa.masks.flexprefill.kernels.pooled_attention import pooled_attention
from flexprefill_fa.masks.flexprefill.kernels.rows import write_paper_rows

_NO_LIMIT = 2**30


def select(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: FlexPrefillConfig,
    scale: float | None = None,
    all_partial: bool = False,
    zero_tails: bool = False,
) -> tuple[Tensor, ...]:
    """The same as the rule in `reference`; entries past the counts are unwritten unless zero_tails.

    Raises:
        ValueError: for more key blocks than the row writer can count.
    """
    query, key, grid, ranges = prepare(query, key, starts, lengths, config.block_size)
    batch, heads, _, dim = query.shape
    size = grid.block_size
    scale = 1 / math.sqrt(dim) if scale is None else scale
    is_published = config.variant == "published"
    lists = empty_lists(batch, heads, grid, query.device)
    outputs = {"dense_tokens": config.dense_tokens, "all_partial": all_partial, "zero_tails": zero_tails}

    mean_key = block_mean(key, ranges, 0, size)
    parts = last_query_scores(query, key, ranges, size, scale)
    scores = merge_parts(parts, mean_key, ranges, heads=heads, block_size=size, scale=scale)
    distance, aware, thresholds = head_pattern(
        scores.logits,
        scores.columns,
        ranges,
        heads=heads,
        offset=grid.offset,
        block_size=size,
        tau=config.tau,
        gamma=config.gamma,
        dense_tokens=config.dense_tokens,
        published=is_published,
    )
    js_distance = distance.view(batch, heads)
    if config.keeps_everything:  # no choice is read
        write_line_rows(ranges, aware, aware, None, None, lists, grid, dense=True, **outputs)
        return *lists, js_distance

    pooled_scores = pooled = None
    if config.tau > 0:
        mean_query = block_mean(query, ranges, grid.offset, size, active=aware)
        pooled_scores = pooled_attention(
            mean_query,
            mean_key,
            ranges,
            aware,
            offset=grid.offset,
            kv_len=grid.kv_len,
            block_size=size,
            scale=scale,
        )
        pooled = coverage(
            pooled_scores.flatten(1),
            thresholds[2],
            keep_crossing=not is_published,
            active=aware,
            line=grid.kv_blocks,
            first_width=grid.offset // size + 2,
        )

    least = cdiv(config.min_budget, size)
    tokens = coverage(scores.tokens.flatten(0, 1), thresholds[:2].flatten(), keep_crossing=not is_published)
    if is_published:
        most = _NO_LIMIT if config.max_budget is None else cdiv(config.max_budget, size)
        chosen = choose(
            scores.columns,
            scores.diagonals,
            tokens.length,
            ranges,
            heads=heads,
            block_size=size,
            budget=CoverageBudget(aware, least, most),
        )
        write_line_rows(ranges, aware, chosen, pooled_scores, pooled, lists, grid, dense=False, **outputs)
        return *lists, js_distance

    by_token, by_offset = (Prefix(*(part.chunk(2)[kind] for part in tokens)) for kind in range(2))
    columns = paper.column_hits(scores.tokens[0], by_token, ranges, heads=heads, blocks=grid.kv_blocks, block_size=size)
    mass, hit = paper.diagonal_windows(
        scores.tokens[1], by_offset, ranges, heads=heads, offset=grid.offset, blocks=grid.kv_blocks, block_size=size
    )
    write_paper_rows(
        ranges,
        aware,
        scores.columns,
        columns,
        mass,
        hit,
        pooled_scores,
        pooled,
        lists,
        grid,
        least=least,
        most=None if config.max_budget is None else config.max_budget // size,
        **outputs,
    )
    return *lists, js_distance
