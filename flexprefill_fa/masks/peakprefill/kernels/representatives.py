"""Representatives of key blocks: one program for each block of a key head, whose keys stay in registers.

Per key: R seeds, CLUSTER_STEPS + 1 looks at R centres and as many means, some 20 R D operations; keys are read once.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range
from flexprefill_fa.masks.peakprefill.config import PeakPrefillConfig
from flexprefill_fa.masks.peakprefill.representatives import BY_LENGTH, CLUSTER_STEPS, QUERY_STEP

SPLITS = 16  # programs that share the queries of a key head
QUERY_ROWS = 32  # queries of a program at a time
MOST_BY_LENGTH, FEWEST_BY_LENGTH, LONGEST_WITH_MOST = map(tl.constexpr, BY_LENGTH)


class Representatives(NamedTuple):
    """Representative i of key block J of kv head g of element b is row ((b Hkv + g) most + i) nk + J."""

    vectors: Tensor  # [B * Hkv * most * nk, BLOCK_D] in the inputs' dtype, 0 in the padding of D
    biases: Tensor  # [B * Hkv * most * nk] fp32, in units of log 2
    most: int  # representatives that a block may have
    per_block: int  # those that it has, 0 where its sequence's length decides


@triton.jit
def count_of(start, end, per_block, BLOCK: tl.constexpr):
    """Representatives of a block of the sequence at [start, end)."""
    keys = end - start // BLOCK * BLOCK
    by_length = tl.where(keys <= LONGEST_WITH_MOST, MOST_BY_LENGTH, FEWEST_BY_LENGTH)
    return tl.where(per_block > 0, per_block, by_length)


@triton.jit
def sampled_queries(start, end, offset, STEP: tl.constexpr):
    """The last real query, and how many there are at every STEP-th position up to it."""
    last = end - 1 - offset
    return last, tl.maximum(last - tl.maximum(start - offset, 0) + STEP, 0) // STEP


@triton.jit(do_not_specialize=LENGTHS)
def _squares_kernel(
    query,  # [B, Hq, q_len, D]
    ranges,  # [B, 2]
    sums,  # [B * Hkv, SPLITS, BLOCK_D] fp32, out: sums of q^2
    stride_b,
    stride_h,
    stride_l,
    kv_heads,
    groups,
    offset,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // kv_heads)
    last, count = sampled_queries(start, end, offset, STEP)
    query += row // kv_heads * stride_b + row % kv_heads * groups * stride_h
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(split * ROWS, count * groups, SPLITS * ROWS):
        item = first + tl.arange(0, ROWS)
        place = (item % groups).to(tl.int64) * stride_h + (last - item // groups * STEP).to(tl.int64) * stride_l
        inside = (item < count * groups)[:, None] & (dim < D)[None, :]
        values = tl.load(query + place[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        total += tl.sum(values * values, 0)
    tl.store(sums + (row * SPLITS + split) * BLOCK_D + dim, total)


@triton.jit
def _squared_distance(keys, centre):
    apart = keys - centre[None, :]
    return tl.sum(apart * apart, 1)


@triton.jit
def _item(values, place):
    """Row `place` of values `[N, BLOCK_D]`."""
    row = tl.arange(0, values.shape[0])
    return tl.sum(tl.where((row == place)[:, None], values, 0.0), 0)


@triton.jit
def _farthest(distance, real):
    """The lowest place of the largest distance of a real key, and that distance; -1 where no key is left."""
    lane = tl.arange(0, distance.shape[0])
    distance = tl.where(real, distance, -1.0)
    largest = tl.max(distance, 0)
    return tl.min(tl.where(distance == largest, lane, distance.shape[0]), 0), largest


@triton.jit
def _clusters(keys, real, distance, count, ROUND: tl.constexpr, STEPS: tl.constexpr):
    """Cluster of each key, int32 `[BLOCK]`, of at most ROUND."""
    index = tl.arange(0, ROUND)
    centres = tl.zeros([ROUND, keys.shape[1]], tl.float32)
    used = tl.zeros([ROUND], tl.int32)
    for seed in range(count):
        place, largest = _farthest(distance, real)
        centre = _item(keys, place)
        centres = tl.where((index == seed)[:, None], centre[None, :], centres)
        used = tl.where(index == seed, tl.where(seed == 0, 1, (largest > 0).to(tl.int32)), used)
        distance = tl.minimum(distance, _squared_distance(keys, centre))
    cluster = tl.zeros([keys.shape[0]], tl.int32)
    for step in range(STEPS + 1):
        nearest = tl.full([keys.shape[0]], float("inf"), tl.float32)
        for i in range(count):
            known = tl.sum(tl.where(index == i, used, 0), 0) > 0
            apart = _squared_distance(keys, _item(centres, i))
            closer = apart < tl.where(known, nearest, 0.0)  # never for a centre that stands for nothing
            cluster = tl.where(closer, i, cluster)
            nearest = tl.where(closer, apart, nearest)
        if step < STEPS:
            for i in range(count):
                member = (real & (cluster == i)).to(tl.float32)
                members = tl.sum(member, 0)
                mean = tl.sum(keys * member[:, None], 0) / tl.maximum(members, 1.0)
                moved = tl.where(index == i, members, 0.0) > 0
                centres = tl.where(moved[:, None], mean[None, :], centres)
    return cluster


@triton.jit
def _outliers(real, distance, count):
    """1, 2, ... for the keys farthest from the mean, 0 for all others."""
    lane = tl.arange(0, distance.shape[0])
    cluster = tl.zeros([distance.shape[0]], tl.int32)
    for i in range(1, count):
        place, largest = _farthest(distance, real & (cluster == 0))
        cluster = tl.where(lane == place, tl.where(largest >= 0, i, 0), cluster)
    return cluster


@triton.jit(do_not_specialize=[*LENGTHS, "per_block"])
def _representatives_kernel(
    key,  # [B, Hkv, kv_len, D]
    ranges,  # [B, 2]
    squares,  # [B * Hkv, SPLITS, BLOCK_D] fp32
    vectors,  # [B * Hkv, MOST, blocks, BLOCK_D], out
    biases,  # [B * Hkv, MOST, blocks] fp32, out
    stride_b,
    stride_h,
    stride_l,
    kv_heads,
    groups,
    offset,
    blocks,
    per_block,
    factor,  # s^2 log2(e) / 2
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    ROUND: tl.constexpr,
    CLUSTERS: tl.constexpr,
    VARIANCE: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = real_range(ranges, row // kv_heads)
    position = block * BLOCK + tl.arange(0, BLOCK)
    real = (position >= start) & (position < end)
    dim = tl.arange(0, BLOCK_D)
    source = row // kv_heads * stride_b + row % kv_heads * stride_h + position.to(tl.int64)[:, None] * stride_l
    inside = real[:, None] & (dim < D)[None, :]
    keys = tl.load(key + source + dim[None, :], mask=inside, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_D]
    count = count_of(start, end, per_block, BLOCK)
    mean = tl.sum(keys, 0) / tl.maximum(tl.sum(real.to(tl.float32), 0), 1.0)
    distance = _squared_distance(keys, mean)
    if CLUSTERS:
        cluster = _clusters(keys, real, distance, count, ROUND, STEPS)
    else:
        cluster = _outliers(real, distance, count)
    if VARIANCE:
        _, queries = sampled_queries(start, end, offset, STEP)
        split = tl.arange(0, SPLITS)
        square = tl.sum(tl.load(squares + (row * SPLITS + split)[:, None] * BLOCK_D + dim[None, :]), 0)
        square = square / tl.maximum((queries * groups).to(tl.float32), 1.0) * factor
    for i in range(count):
        member = (real & (cluster == i)).to(tl.float32)
        members = tl.sum(member, 0)
        vector = tl.sum(keys * member[:, None], 0) / tl.maximum(members, 1.0)
        bias = tl.log2(members)
        if VARIANCE:
            apart = keys - vector[None, :]
            spread = tl.sum(apart * apart * member[:, None], 0) / tl.maximum(members, 1.0)
            bias += tl.sum(spread * square, 0)
        target = (row * MOST + i) * blocks + block
        tl.store(vectors + target * BLOCK_D + dim, vector.to(vectors.dtype.element_ty))
        tl.store(biases + target, bias)


def representatives(
    query: Tensor, key: Tensor, ranges: Tensor, grid: Grid, config: PeakPrefillConfig, scale: float
) -> Representatives:
    """The same as the plain `representatives`, of a batch; undefined for blocks without a real key."""
    batch, kv_heads, _, dim = key.shape
    groups, padded = query.shape[1] // kv_heads, max(16, triton.next_power_of_2(dim))
    per_block = config.per_block or 0
    most = per_block or BY_LENGTH[0]
    rows = batch * kv_heads * most * grid.kv_blocks
    vectors = torch.empty(rows, padded, dtype=key.dtype, device=key.device)
    biases = torch.empty(rows, dtype=torch.float32, device=key.device)
    squares = torch.empty(batch * kv_heads, SPLITS, padded, dtype=torch.float32, device=key.device)
    sizes = {"D": dim, "BLOCK_D": padded, "SPLITS": SPLITS, "STEP": QUERY_STEP}
    with on_device(key):
        if config.variance:
            _squares_kernel[(SPLITS, batch * kv_heads)](
                query, ranges, squares, *query.stride()[:3], kv_heads, groups, grid.offset, ROWS=QUERY_ROWS, **sizes
            )
        _representatives_kernel[(grid.kv_blocks, batch * kv_heads)](
            key, ranges, squares, vectors, biases, *key.stride()[:3], kv_heads, groups, grid.offset, grid.kv_blocks,
            per_block, scale * scale * LOG2E / 2, BLOCK=grid.block_size, MOST=most,
            ROUND=triton.next_power_of_2(most), CLUSTERS=config.representatives == "clusters",
            VARIANCE=config.variance, STEPS=CLUSTER_STEPS, num_warps=4 if padded <= 64 else 8, **sizes,
        )  # fmt: skip
    return Representatives(vectors, biases, most, per_block)
