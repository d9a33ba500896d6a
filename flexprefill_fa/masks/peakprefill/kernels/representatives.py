"""Representatives of key blocks: one program for each block of a key head, whose keys are read once.

Seeds by distances as they are, a key at a time. After that distances to centres and means of members are matrix
products, where centres go as two parts of the inputs' dtype: together 16 bits of bf16 or 22 of fp16. fp32 goes without
products, a cluster at a time.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill_fa.grid import Grid, cdiv, next_power_of_2
from flexprefill_fa.kernels.common import LENGTHS, LOG2E, on_device, real_range
from flexprefill_fa.masks.peakprefill.config import MOST_REPRESENTATIVES, PeakPrefillConfig
from flexprefill_fa.masks.peakprefill.representatives import CLUSTER_STEPS, QUERY_STEP, count_of

SPLITS = 16  # programs that share the queries of a key head
QUERY_ROWS = 32  # queries of a program at a time
ROUND = MOST_REPRESENTATIVES  # columns of members; 16 is also the least side of a matrix product


class Representatives(NamedTuple):
    """Representative i of key block J of kv head g of element b, R = `most` and T = `width` / R:

    row (((b Hkv + g) tiles + J // T) R + i) T + J % T. Undefined for blocks without a real key.
    """

    vectors: Tensor  # [B * Hkv * tiles * R * T, BLOCK_D] in the inputs' dtype, 0 in the padding of D
    biases: Tensor  # [B * Hkv * tiles * R * T] fp32, in units of log 2, minus infinity for those that stand for nothing
    tiles: int
    most: int  # representatives of a block, rounded up to a power of two
    width: int  # representatives of a tile


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
        values = tl.load(query + place[:, None] + dim[None, :], mask=inside, other=0.0).to(
            tl.float32
        )  # [ROWS, BLOCK_D]
        total += tl.sum(values * values, 0)
    tl.store(sums + (row * SPLITS + split) * BLOCK_D + dim, total)


@triton.jit
def _row(values, i):
    """Row i of values `[N, BLOCK_D]`."""
    return tl.sum(tl.where((tl.arange(0, values.shape[0]) == i)[:, None], values, 0.0), 0)


@triton.jit
def _column(values, i):
    """Column i of values `[N, ROUND]`."""
    return tl.sum(tl.where((tl.arange(0, values.shape[1]) == i)[None, :], values, 0.0), 1)


@triton.jit
def _parts(values, like):
    """Two parts of the dtype of `like` that sum up to the values."""
    high = values.to(like.dtype)
    return high, (values - high.to(tl.float32)).to(like.dtype)


@triton.jit
def _means(keys, members, count):
    """Means of the members' keys, fp32 `[ROUND, BLOCK_D]`; members `[BLOCK, ROUND]`, 0 or 1."""
    if keys.dtype == tl.float32:
        index = tl.arange(0, members.shape[1])
        sums = tl.zeros([members.shape[1], keys.shape[1]], tl.float32)
        for i in range(count):
            sums = tl.where((index == i)[:, None], tl.sum(keys * _column(members, i)[:, None], 0)[None, :], sums)
    else:
        sums = tl.dot(tl.trans(members.to(keys.dtype)), keys)
    return sums / tl.maximum(tl.sum(members, 0), 1.0)[:, None]


@triton.jit
def _of_each_key(keys, members, means, count):
    """The mean that each key belongs to, fp32 `[BLOCK, BLOCK_D]`."""
    if keys.dtype == tl.float32:
        found = tl.zeros([keys.shape[0], keys.shape[1]], tl.float32)
        for i in range(count):
            found += _column(members, i)[:, None] * _row(means, i)[None, :]
    else:
        high, low = _parts(means, keys)
        found = tl.dot(members.to(keys.dtype), low)
        found = tl.dot(members.to(keys.dtype), high, found)
    return found


@triton.jit
def _distances(keys, centres, mean, count):
    """Squared distances `[BLOCK, ROUND]`; from a product, less each key's own to the mean, beside which centres go."""
    if keys.dtype == tl.float32:
        index = tl.arange(0, centres.shape[0])
        apart = tl.zeros([keys.shape[0], centres.shape[0]], tl.float32)
        for i in range(count):
            apart = tl.where((index == i)[None, :], _squared_distance(keys, _row(centres, i))[:, None], apart)
    else:
        beside = centres - mean[None, :]  # small where all keys are large in some channel
        high, low = _parts(beside, keys)
        products = tl.dot(keys, tl.trans(low))
        products = tl.dot(keys, tl.trans(high), products)
        apart = tl.sum(beside * (beside + 2.0 * mean[None, :]), 1)[None, :] - 2.0 * products
    return apart


@triton.jit
def _members(keys, real, centres, mean, used, count):
    """0 or 1 `[BLOCK, ROUND]`: each real key with its nearest centre, the lower one among equals."""
    index = tl.arange(0, centres.shape[0])
    apart = tl.where(used[None, :] > 0, _distances(keys, centres, mean, count), float("inf"))
    nearest = tl.min(apart, 1)
    cluster = tl.min(tl.where(apart == nearest[:, None], index[None, :], centres.shape[0]), 1)
    return tl.where(real[:, None] & (cluster[:, None] == index[None, :]), 1.0, 0.0)


@triton.jit
def _squared_distance(keys, vector):
    apart = keys.to(tl.float32) - vector[None, :]
    return tl.sum(apart * apart, 1)


@triton.jit
def _farthest(distance, real):
    """The lowest place of the largest distance of a real key, and that distance; -1 where no key is left."""
    lane = tl.arange(0, distance.shape[0])
    distance = tl.where(real, distance, -1.0)
    largest = tl.max(distance, 0)
    return tl.min(tl.where(distance == largest, lane, distance.shape[0] - 1), 0), largest


@triton.jit
def _clusters(
    key, stride_l, first, keys, real, mean, distance, count, D: tl.constexpr, ROUND: tl.constexpr, STEPS: tl.constexpr
):
    """Members `[BLOCK, ROUND]` of `count` clusters; distance: of each key to the mean."""
    index, dim = tl.arange(0, ROUND), tl.arange(0, keys.shape[1])
    places, used = tl.zeros([ROUND], tl.int32), tl.zeros([ROUND], tl.int32)
    for seed in range(count):
        place, largest = _farthest(distance, real)
        places = tl.where(index == seed, place, places)
        used = tl.where(index == seed, tl.where(seed == 0, 1, (largest > 0).to(tl.int32)), used)
        vector = tl.load(key + (first + place).to(tl.int64) * stride_l + dim, mask=dim < D, other=0.0)
        distance = tl.minimum(distance, _squared_distance(keys, vector.to(tl.float32)))
    source = (first + places).to(tl.int64)[:, None] * stride_l + dim[None, :]
    seeds = tl.load(key + source, mask=(index < count)[:, None] & (dim < D)[None, :], other=0.0)
    centres = seeds.to(tl.float32)  # [ROUND, BLOCK_D]
    for _ in range(STEPS):
        members = _members(keys, real, centres, mean, used, count)
        centres = tl.where((tl.sum(members, 0) > 0)[:, None], _means(keys, members, count), centres)
    return _members(keys, real, centres, mean, used, count)


@triton.jit
def _outliers(real, distance, count, ROUND: tl.constexpr):
    """Members `[BLOCK, ROUND]`: the farthest keys from the mean by themselves, behind all others together."""
    index, lane = tl.arange(0, ROUND), tl.arange(0, real.shape[0])
    cluster = tl.zeros([real.shape[0]], tl.int32)
    for i in range(1, count):
        place, largest = _farthest(distance, real & (cluster == 0))
        cluster = tl.where(lane == place, tl.where(largest >= 0, i, cluster), cluster)
    return tl.where(real[:, None] & (cluster[:, None] == index[None, :]), 1.0, 0.0)


@triton.jit(do_not_specialize=[*LENGTHS, "count"])
def _representatives_kernel(
    key,  # [B, Hkv, kv_len, D]
    ranges,  # [B, 2]
    squares,  # [B * Hkv, SPLITS, BLOCK_D] fp32
    vectors,  # [B * Hkv, tiles, R, T, BLOCK_D], out
    biases,  # [B * Hkv, tiles, R, T] fp32, out
    stride_b,
    stride_h,
    stride_l,
    kv_heads,
    groups,
    offset,
    tiles,
    count,
    factor,  # s^2 log2(e) / 2
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
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
    dim, index = tl.arange(0, BLOCK_D), tl.arange(0, ROUND)
    key += row // kv_heads * stride_b + row % kv_heads * stride_h
    inside = real[:, None] & (dim < D)[None, :]
    keys = tl.load(key + position.to(tl.int64)[:, None] * stride_l + dim[None, :], mask=inside, other=0.0)
    mean = tl.sum(keys.to(tl.float32), 0) / tl.maximum(tl.sum(real.to(tl.float32), 0), 1.0)
    distance = _squared_distance(keys, mean)
    if CLUSTERS:
        members = _clusters(key, stride_l, block * BLOCK, keys, real, mean, distance, count, D, ROUND, STEPS)
    else:
        members = _outliers(real, distance, count, ROUND)
    number = tl.sum(members, 0)
    means = _means(keys, members, count)
    bias = tl.log2(number)
    if VARIANCE:
        _, queries = sampled_queries(start, end, offset, STEP)
        split = tl.arange(0, SPLITS)
        square = tl.sum(tl.load(squares + (row * SPLITS + split)[:, None] * BLOCK_D + dim[None, :]), 0)
        square = square / tl.maximum((queries * groups).to(tl.float32), 1.0) * factor
        apart = keys.to(tl.float32) - _of_each_key(keys, members, means, count)
        spread = tl.sum(apart * apart * square[None, :], 1)
        bias += tl.sum(members * spread[:, None], 0) / tl.maximum(number, 1.0)
    target = ((row * tiles + block // T) * R + index) * T + block % T
    tl.store(vectors + target[:, None] * BLOCK_D + dim[None, :], means.to(keys.dtype), mask=(index < R)[:, None])
    tl.store(biases + target, bias, mask=index < R)


def represent(
    query: Tensor, key: Tensor, ranges: Tensor, grid: Grid, config: PeakPrefillConfig, scale: float
) -> Representatives:
    """The same as the plain `representatives`, of a batch; undefined for blocks without a real key."""
    batch, kv_heads, _, dim = key.shape
    groups, padded = query.shape[1] // kv_heads, max(16, next_power_of_2(dim))
    count = count_of(config, grid.kv_len)
    most = next_power_of_2(count)
    width = tile_width(padded, key.element_size())
    tiles = cdiv(grid.kv_blocks, width // most)
    rows = batch * kv_heads * tiles * width
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
            key, ranges, squares, vectors, biases, *key.stride()[:3], kv_heads, groups, grid.offset, tiles, count,
            scale * scale * LOG2E / 2, BLOCK=grid.block_size, R=most, T=width // most, ROUND=ROUND,
            CLUSTERS=config.representatives == "clusters", VARIANCE=config.variance, STEPS=CLUSTER_STEPS,
            num_warps=warps_of(padded, key.element_size()), **sizes,
        )  # fmt: skip
    return Representatives(vectors, biases, tiles, most, width)


def tile_width(padded_dim: int, item_bytes: int) -> int:
    """Representatives of a tile, so that queries and tiles stay within 163 KB."""
    wide = padded_dim * item_bytes
    return 64 if wide <= 256 else 32


def warps_of(padded_dim: int, item_bytes: int) -> int:
    """Warps that hold the keys of a block: as few as spill little, so that several programs share an SM."""
    return 4 if padded_dim * item_bytes <= 256 else 8
