"""The oracles of XAttention and CoSA themselves: cases worked by hand, exact attention at stride 1, and margins."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import numpy as np
import oracle_cosa
import oracle_xattention
import pytest
import torch
from oracle_attention import attention_probabilities
from oracle_groups import GroupOracle, Ranking, flip_margins, group_scores, shortest_prefix
from torch import Tensor
from workloads import blocky_qk, needle_pairs, needle_qk, structured_qk

pytestmark = pytest.mark.usefixtures("one_thread")

Select = Callable[..., GroupOracle]


def _xattention(query: Tensor, key: Tensor, share: float, **kwargs) -> GroupOracle:
    return oracle_xattention.oracle_select(query, key, threshold=share, **kwargs)


def _cosa(query: Tensor, key: Tensor, share: float, **kwargs) -> GroupOracle:
    return oracle_cosa.oracle_select(query, key, share=share, **kwargs)


both = pytest.mark.parametrize("select", [_xattention, _cosa], ids=["xattention", "cosa"])
# q_len, kv_len, start, end
SIZES = [
    (1, 1, 0, 1),
    (127, 127, 0, 127),
    (129, 129, 0, 129),
    (500, 500, 0, 500),
    (300, 701, 0, 701),
    (1, 300, 0, 300),
    (400, 400, 77, 391),
    (400, 400, 0, 130),
    (200, 500, 350, 460),
    (129, 500, 3, 380),
]


def _head(q_len: int, kv_len: int, *, make=structured_qk, seed: int = 0) -> tuple[Tensor, Tensor]:
    query, key = make(1, 4, 2, q_len, kv_len, 32, seed=seed)
    return query[0], key[0]


def _last_row(oracle: GroupOracle) -> list[int]:
    return oracle.keep[0, -1].nonzero()[0].tolist()


# --- By hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("q_len", "kv_len", "start", "end"), [s for s in SIZES if s[1] < 400] + [(29, 60, 37, 59)])
def test_scores_sum_the_antidiagonals(q_len: int, kv_len: int, start: int, end: int, stride: int) -> None:
    """Pair by pair over tokens, padded ones left out."""
    query, key = (x[0].double().numpy() for x in _head(q_len, kv_len))
    scale, off = 0.3, kv_len - q_len
    x, real = group_scores(query, key, start=start, end=end, stride=stride, scale=scale)
    expected, seen = np.zeros(x.shape), np.zeros(x.shape, bool)
    logits = query @ key.T
    real_queries = [a for a in range(q_len) if start <= off + a < end]
    for a in real_queries:
        for b in range(start, end):
            if a % stride + b % stride == stride - 1:
                expected[a // stride, b // stride] += logits[a, b] * scale / stride
            # the last real query decides what its group sees, by whole key groups
            seen[a // stride, b // stride] |= b // stride * stride <= off + a
    assert real.nonzero()[0].tolist() == sorted({a // stride for a in real_queries})
    assert ((x > -math.inf) == seen)[real].all()
    np.testing.assert_allclose(x[seen], expected[seen], atol=1e-12)


def _by_weights(*weights: float) -> tuple[Tensor, Tensor]:
    """Query and key `[1, 2G, 1]` with X[r, c] = ln weights[c] at stride 2 and scale 1."""
    key = torch.tensor(weights, dtype=torch.float64).log().repeat_interleave(2)[None, :, None]
    return torch.ones_like(key), key


# Row block 4: group 8 sees weights of 30 in all, group 9 of 60, so A = 0.1 0.3 0.5 0.2 0.9 of 2.
HAND_X = (1, 1, 3, 3, 4, 6, 2, 2, 8, 30)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.01, [0, 4]),  # the best alone, which is kept anyway, and block 0
        (0.44, [0, 4]),
        (0.46, [0, 2, 4]),
        (0.69, [0, 2, 4]),
        (0.72, [0, 1, 2, 4]),  # block 0 is ranked last: had it counted first, 0.9 + 0.1 + 0.5 would do
        (0.84, [0, 1, 2, 4]),
        (0.86, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_xattention_by_hand(threshold: float, expected: list[int]) -> None:
    oracle = _xattention(*_by_weights(*HAND_X), threshold, stride=2, block_size=4, scale=1.0)
    assert _last_row(oracle) == expected
    assert oracle.by_score[0, -1].tolist() == [False, True, True, True, False]


def test_xattention_margins_by_hand() -> None:
    """At 1.2 of 2: order 4, 2, 1, 3, 0 with 0.9, 0.5, 0.3, 0.2, 0.1; scores up to ln 30."""
    oracle = _xattention(*_by_weights(*HAND_X), 0.6, stride=2, block_size=4, scale=1.0)
    expected = [
        math.inf,
        (1.4 - 1.2) / 1.2,  # dropped, 1.4 before it
        (1.2 - 0.9) / 1.2,  # kept, 0.9 before it; as far as being overtaken by 1, (0.5 - 0.3) / 0.8
        (0.3 - 0.2) / 0.5,  # it overtakes 1, and then 1.4 before it is 0.17 from 1.2
        math.inf,
    ]
    np.testing.assert_allclose(oracle.margin[0, -1] * (1 + math.log(30)), expected)


# Row block 4: group 8 sees up to weight 8, group 9 up to 16. Sums of P: 0.375 0.5625 1.5 1.40625 1.125.
@pytest.mark.parametrize(
    ("share", "third", "expected"),
    [
        (0.2, 7.5, [0, 2, 4]),
        (0.5, 7.5, [0, 2, 4]),  # 2.625 of 4.97: block 4, a maximum, comes before block 3, whose sum is larger
        (0.8, 7.5, [0, 2, 3, 4]),
        (0.85, 7.5, [0, 1, 2, 3, 4]),
        (0.5, 7.98, [0, 2, 4]),  # P of 3 = 0.9975
        (0.5, 7.996, [0, 2, 3, 4]),  # 0.9995: a maximum too, and its sum is larger than 4's
        (1.0, 7.5, [0, 1, 2, 3, 4]),
    ],
)
def test_cosa_by_hand(share: float, third: float, expected: list[int]) -> None:
    query, key = _by_weights(1, 2, 3, 1, 8, 5, third, 2, 1, 16)
    assert _last_row(_cosa(query, key, share, stride=2, block_size=4, scale=1.0)) == expected


def test_cosa_stops_within_the_maxima() -> None:
    """They come first, but the share may be reached before the last of them."""
    query, key = torch.zeros(1, 40, 1), torch.zeros(1, 40, 1)
    oracle = _cosa(query, key, 0.3, stride=2, block_size=4)
    assert _last_row(oracle) == [0, 1, 2, 9]  # all hold a maximum; 3 of 10, equals to the lower block


def test_xattention_ties_go_to_the_lower_block() -> None:
    query, key = torch.zeros(1, 20, 3), torch.zeros(1, 20, 3)
    oracle = _xattention(query, key, 0.4, stride=2, block_size=4)
    assert _last_row(oracle) == [0, 1, 4]  # 2/9 + 2/10 each, 0.8 wanted
    assert oracle.margin[0, -1].tolist() == [math.inf, 0, 0, 0, math.inf]


@both
def test_a_share_of_one_keeps_what_rounding_loses(select: Select) -> None:
    """The sum of the other blocks is 1 part in 10^30: float64 reaches the whole without them."""
    query, key = _by_weights(1, 1, 1, 1, 1, 1, 1e30, 1e30, 1e30, 1e30)
    call = partial(select, query, key, stride=2, block_size=4, scale=1.0)
    assert _last_row(call(share=1.0)) == [0, 1, 2, 3, 4]
    assert _last_row(call(share=0.999999)) == [0, 3, 4]
    assert np.isinf(call(share=1.0).margin).all()


@both
@pytest.mark.parametrize(("key_at", "found"), [(2, True), (3, False), (1, False)])
def test_a_pair_shows_on_the_antidiagonal_alone(select: Select, key_at: int, found: bool) -> None:
    """Query 5 of its group meets key S - 1 - 5 = 2 of a group."""
    query, key = torch.zeros(1, 448, 2), torch.zeros(1, 448, 2)
    query[0, 6 * 64 + 24 + 5, 0] = key[0, 2 * 64 + 16 + key_at, 0] = 30.0
    assert (_last_row(select(query, key, 0.16, stride=8, block_size=64)) == [0, 2, 6]) == found


def test_needles_are_attended_to() -> None:
    """What `needle_qk` promises: these queries attend to their keys."""
    for q_len, kv_len in ((1, 1), (129, 129), (1000, 1000), (300, 2048)):
        pairs = needle_pairs(q_len, kv_len)
        query, key = needle_qk(1, 4, 2, q_len, kv_len, 64)
        probability = attention_probabilities(query, key)[0]
        assert len(pairs) == len({position for _, position in pairs}) >= 1
        for index, position in pairs:
            assert (probability[:, index, position] > 0.9).all(), (q_len, kv_len, index, position)


# --- Against exact attention ------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("q_len", "kv_len", "start", "end"), SIZES)
@pytest.mark.parametrize("make", [structured_qk, needle_qk])
def test_stride_one_is_exact_attention(
    select: Select, q_len: int, kv_len: int, start: int, end: int, make: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Groups of one token: a block's weight is its exact probability, or its highest one by the row's highest."""
    size, share = 64, 0.85
    query, key = _head(q_len, kv_len, make=make)
    oracle = select(query, key, share, stride=1, block_size=size, start=start, end=end)
    p = attention_probabilities(query[None], key[None], None, [start], [end - start])[0]
    own = torch.zeros_like(p)
    own[:, torch.arange(q_len), torch.arange(kv_len - q_len, kv_len)] = 1
    fill = (0, -kv_len % size, 0, -q_len % size)

    def blocks(x: Tensor) -> Tensor:  # [H, nq, B, nk, B]
        return torch.nn.functional.pad(x, fill).unflatten(2, (-1, size)).unflatten(1, (-1, size))

    visible = blocks(p).amax((2, 4)) > 0
    always = visible & (blocks(own * (p > 0)).amax((2, 4)) > 0)
    always |= visible & (visible.cumsum(-1) == 1)
    if select is _xattention:
        weights, first = blocks(p).sum((2, 4)), torch.zeros_like(visible)
    else:
        relative = blocks(p / p.amax(-1, keepdim=True).clamp(min=1e-300)).amax(4)  # [H, nq, B, nk]
        weights, first = relative.sum(2), relative.amax(2) >= 0.999
    rank = weights + 1e3 * first  # a row block has at most 64 rows, so no sum is above 64
    lower = torch.ones(visible.shape[-1], visible.shape[-1], dtype=torch.bool).tril(-1)
    better = (rank[..., None, :] > rank[..., :, None]) | ((rank[..., None, :] == rank[..., :, None]) & lower)
    before = (better * weights[..., None, :]).sum(-1)
    expected = visible & ((before < share * weights.sum(-1, keepdim=True)) | always)
    clear = oracle.margin > 1e-10
    assert np.array_equal(oracle.keep[clear], expected.numpy()[clear])
    assert np.array_equal(oracle.by_score, (visible & ~always).numpy())
    assert clear.mean() > 0.99


# --- Chunks, padding, heads, sizes ------------------------------------------------------------------------------------


@both
def test_a_chunk_of_whole_blocks_is_the_end_of_the_whole(select: Select) -> None:
    query, key = _head(900, 900)
    call = partial(select, share=0.8, stride=8, block_size=64)
    whole, chunk = call(query, key), call(query[:, 384:], key)
    assert np.array_equal(whole.keep[:, 6:], chunk.keep)
    np.testing.assert_allclose(whole.margin[:, 6:], chunk.margin, rtol=1e-6, atol=1e-12)
    odd = call(query[:, 383:], key)
    assert odd.keep.shape == (4, 9, 15) and odd.keep[:, 0, 5:7].all()  # positions 383 to 446: two diagonal blocks


@both
def test_padding_takes_no_part(select: Select) -> None:
    """Whole blocks shift the selection; whatever stands in them, and in the rest of a partial block."""
    query, key = _head(501, 501)
    call = partial(select, share=0.8, stride=16, block_size=64)
    alone = call(query, key)
    bad = torch.full((4, 128, 32), torch.nan)

    def around(x: Tensor, end: int) -> Tensor:
        return torch.cat((bad[: len(x)], x[:, :end], torch.full((len(x), 80, 32), torch.inf)), 1)

    padded = call(around(query, 501), around(key, 501), start=128, end=629)
    assert np.array_equal(padded.keep[:, 2:10, 2:10], alone.keep)
    assert padded.keep.sum() == alone.keep.sum()
    np.testing.assert_allclose(padded.margin[:, 2:10, 2:10], alone.margin, rtol=1e-6, atol=1e-12)
    inside = call(query, key, start=70, end=443)  # in the middle of groups and blocks
    query[:, :70], key[:, :70], query[:, 443:], key[:, 443:] = torch.nan, torch.inf, torch.inf, torch.nan
    again = call(query, key, start=70, end=443)
    assert np.array_equal(inside.keep, again.keep) and np.array_equal(inside.margin, again.margin)
    assert not again.keep[:, 0].any() and not again.keep[:, 7].any() and not again.keep[:, :, 0].any()
    assert again.keep[:, 1:7, 1].all() and np.array_equal(again.keep[:, 1:7, 7], np.zeros((4, 6)))


@both
def test_query_heads_share_their_key_head(select: Select) -> None:
    query, key = _head(400, 400)
    call = partial(select, share=0.8, stride=8, block_size=64)
    together = call(query, key)
    for head in range(4):
        alone = call(query[head : head + 1], key[head // 2 : head // 2 + 1])
        assert np.array_equal(together.keep[head], alone.keep[0])
    swapped = call(query, key.flip(0))
    assert not np.array_equal(together.keep, swapped.keep)


@both
@pytest.mark.parametrize(("q_len", "kv_len", "start", "end"), SIZES)
@pytest.mark.parametrize("block_size", [64, 128])
def test_well_formed(select: Select, q_len: int, kv_len: int, start: int, end: int, block_size: int) -> None:
    query, key = _head(q_len, kv_len, make=blocky_qk)
    calls = [select(query, key, p, stride=8, block_size=block_size, start=start, end=end) for p in (0.01, 0.7, 0.9, 1)]
    visible, always = np.zeros_like(calls[0].keep), np.zeros_like(calls[0].keep)
    for i in range(start, end):
        index = i - (kv_len - q_len)
        if index >= 0:
            row = index // block_size
            visible[:, row, start // block_size : i // block_size + 1] = True
            always[:, row, [start // block_size, i // block_size]] = True
    for oracle, more in pairwise(calls):
        assert not (oracle.keep & ~more.keep).any()
    assert np.array_equal(calls[-1].keep, visible), "a share of 1 keeps every causal block"
    assert not (always & ~calls[0].keep).any()
    assert ((calls[0].keep & ~always).sum(-1) <= 1).all(), "the best block alone reaches 1 %"
    for oracle in calls:
        assert np.array_equal(oracle.by_score, visible & ~always)
        assert np.isinf(oracle.margin[~oracle.by_score]).all()


@both
def test_stride_must_divide_the_block(select: Select) -> None:
    with pytest.raises(ValueError, match="stride must divide block_size 64, got 24"):
        select(*_head(64, 64), 0.9, stride=24, block_size=64)


# --- Margins ----------------------------------------------------------------------------------------------------------


def _kept(ranking: Ranking, share: float) -> set[int]:
    order = ranking.order(list(range(len(ranking.weights))))
    return set(shortest_prefix(order, ranking.weights, share))


def _can_flip(ranking: Ranking, share: float, error: float) -> set[int]:
    """The blocks that flip for some weights that are off by the error, and some blocks' `first` within it."""
    before, flipped = _kept(ranking, share), set()
    n = len(ranking.weights)
    for signs in product((-1, 1), repeat=n):
        for toggles in product(*((False, True) if gap <= error else (False,) for gap in ranking.first_gap)):
            weights = ranking.weights * (1 + error * np.array(signs))
            off = Ranking(weights, ranking.first ^ np.array(toggles), ranking.first_gap)
            flipped |= before ^ _kept(off, share)
    return flipped


@pytest.mark.parametrize("tiers", [False, True], ids=["xattention", "cosa"])
def test_margins_against_all_perturbations(tiers: bool) -> None:
    """Nothing flips within a third of its margin, and most of what has a small one does within three times that."""
    random = np.random.default_rng(0)
    small = tight = 0
    for _ in range(60):
        weights, share = random.exponential(size=5) + 0.1, float(random.uniform(0.3, 0.95))
        gap = random.exponential(0.1, 5) if tiers else np.full(5, math.inf)
        ranking = Ranking(weights, random.random(5) < 0.5 * tiers, gap)
        order = ranking.order(list(range(5)))
        margins = flip_margins(ranking, order, len(_kept(ranking, share)), share)
        for j, margin in zip(order, margins, strict=True):
            assert j not in _can_flip(ranking, share, min(margin / 3, 0.3)), (ranking, share, j, margin)
            if margin < 0.1:
                small, tight = small + 1, tight + (j in _can_flip(ranking, share, 3 * margin + 1e-9))
    assert small > 50 and tight > 0.5 * small, (small, tight)


@both
@pytest.mark.parametrize("make", [structured_qk, blocky_qk, needle_qk])
def test_few_decisions_are_near(select: Select, make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Many blocks are kept by score and many dropped, and what fp32 may flip is rare."""
    oracle = select(*_head(2048, 2048, make=make), 0.8, stride=8, block_size=64)
    kept = (oracle.keep & oracle.by_score).sum() / oracle.by_score.sum()
    assert 0.1 < kept < 0.9, kept
    assert (oracle.margin < 2e-6).sum() <= 0.001 * oracle.by_score.sum()
