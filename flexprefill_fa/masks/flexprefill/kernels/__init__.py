"""FlexPrefill's selection in Triton: no host synchronisation, no loop over heads, bitwise repeatable."""

import math

import torch
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv, real_ranges
from flexprefill_fa.kernels.common import unit_stride
from flexprefill_fa.kernels.coverage import coverage
from flexprefill_fa.kernels.pooling import block_mean
from flexprefill_fa.masks.flexprefill.config import FlexPrefillConfig
from flexprefill_fa.masks.flexprefill.kernels import paper, published, rows
from flexprefill_fa.masks.flexprefill.kernels.last_query import last_query_scores
from flexprefill_fa.masks.flexprefill.kernels.pattern import head_pattern
from flexprefill_fa.masks.flexprefill.kernels.pooled_attention import pooled_attention

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same as `reference.select`; entries past the counts are unwritten unless zero_tails."""
    query, key = unit_stride(query), unit_stride(key)
    batch, heads, q_len, dim = query.shape
    size = config.block_size
    grid = Grid(q_len, key.shape[2], size)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    is_published = config.variant == "published"
    device = query.device
    ranges = real_ranges(starts, lengths, batch, grid.kv_len, device)
    lists = rows.empty_lists(batch, heads, grid, device)
    outputs = {"dense_tokens": config.dense_tokens, "all_partial": all_partial, "zero_tails": zero_tails}

    vertical, slash = last_query_scores(query, key, ranges, size, scale)  # [B * Hq, Lkv]
    mean_key = block_mean(key, ranges, 0, size)
    distance, aware, column_sums = head_pattern(
        query,
        mean_key,
        ranges,
        vertical,
        kv_len=grid.kv_len,
        block_size=size,
        scale=scale,
        tau=config.tau,
        dense_tokens=config.dense_tokens,
        published=is_published,
    )
    distance = distance.view(batch, heads)
    if config.keeps_everything:
        rows.write_published_rows(ranges, aware, aware, aware, None, lists, grid, dense=True, **outputs)
        return *lists, distance

    pooled_scores = pooled = None
    if config.tau > 0:
        mean_query = block_mean(query, ranges, grid.offset, size)
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
        row_blocks = _real_row_blocks(ranges, grid).repeat_interleave(heads)  # nq
        threshold = (row_blocks.double() * config.gamma).float()
        _, pooled = coverage(
            pooled_scores.flatten(1), threshold, keep_crossing=not is_published, mark=True, active=aware
        )

    gamma = torch.full((batch * heads,), config.gamma, dtype=torch.float32, device=device)
    least = cdiv(config.min_budget, size)
    if is_published:
        columns, diagonals = published.choose(
            slash,
            column_sums,
            coverage(vertical, gamma, keep_crossing=False, mark=False)[0],
            coverage(slash, gamma, keep_crossing=False, mark=False)[0],
            aware,
            ranges,
            heads=heads,
            least=least,
            most=_NO_LIMIT if config.max_budget is None else cdiv(config.max_budget, size),
            block_size=size,
        )
        rows.write_published_rows(ranges, aware, columns, diagonals, pooled, lists, grid, dense=False, **outputs)
        return *lists, distance

    _, kept_tokens = coverage(vertical, gamma, keep_crossing=True, mark=True)
    _, kept_offsets = coverage(slash, gamma, keep_crossing=True, mark=True)
    assert kept_tokens is not None and kept_offsets is not None  # asked for by mark
    columns = paper.column_hits(kept_tokens, blocks=grid.kv_blocks, block_size=size)
    mass, hit = paper.diagonal_windows(
        slash, kept_offsets, ranges, heads=heads, offset=grid.offset, blocks=grid.kv_blocks, block_size=size
    )
    rows.write_paper_rows(
        ranges,
        aware,
        column_sums,
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
    return *lists, distance


def _real_row_blocks(ranges: Tensor, grid: Grid) -> Tensor:
    """int32 `[B]`: number of row blocks that hold a real query."""
    start, end = ranges.unbind(1)
    size = grid.block_size
    first = (start - grid.offset).clamp(min=0) // size
    return ((end - grid.offset + size - 1) // size - first).clamp(min=0)
