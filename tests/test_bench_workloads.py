"""The benchmark's inputs: repeatable, shaped as asked, with heads that attend as their archetype says."""

import itertools

import pytest
import torch

from bench.workloads import (
    ARCHETYPES,
    FIXED_SHARPNESS,
    SEGMENT,
    SHARPNESS,
    Group,
    Inputs,
    archetype_of,
    sharpness_of,
    structured_inputs,
)
from flexprefill_fa import FlexPrefillConfig, select_blocks

N, DIM = 2048, 128


def exact_probability(group: Group, name: str, rows: int = 128) -> torch.Tensor:
    """Attention of the last rows, fp64 `[rows, n]`, of a head of one archetype at sharpness 1."""
    query = group.query(ARCHETYPES[name])[-rows:].double()
    n = len(group.key)
    scores = query @ group.key.double().T * DIM**-0.5
    visible = torch.arange(n) <= torch.arange(n - rows, n)[:, None]
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def test_shapes_dtype_and_repeatability() -> None:
    def make(seed: int) -> Inputs:
        return structured_inputs(300, 6, 3, 32, sharpness=1.0, seed=seed)

    first, again, other = make(0), make(0), make(1)
    assert first.query.shape == (1, 6, 300, 32)
    assert first.key.shape == first.value.shape == (1, 3, 300, 32)
    for name in ("query", "key", "value"):
        tensor = getattr(first, name)
        assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous() and tensor.isfinite().all()
        assert torch.equal(tensor, getattr(again, name))
        assert not torch.equal(tensor, getattr(other, name))
    heads = [*first.query.flatten(0, 1), *first.key.flatten(0, 1), *first.value.flatten(0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(heads, 2))


def test_heads_of_a_group_do_not_depend_on_other_groups() -> None:
    wide = structured_inputs(300, 4, 2, 32, sharpness=1.0)
    narrow = structured_inputs(300, 2, 1, 32, sharpness=1.0)
    assert torch.equal(wide.query[:, :2], narrow.query)
    assert torch.equal(wide.key[:, :1], narrow.key)


def test_sharpness_scales_the_queries_alone() -> None:
    sharp, blunt = (structured_inputs(300, 2, 1, 32, sharpness=s, dtype=torch.float32) for s in (2.0, 1.0))
    torch.testing.assert_close(sharp.query, 2 * blunt.query)
    assert torch.equal(sharp.key, blunt.key) and torch.equal(sharp.value, blunt.value)


def test_local_heads_attend_nearby_and_to_the_sink() -> None:
    probability = exact_probability(Group(N, DIM, 0), "local")
    distance = torch.arange(N - 128, N)[:, None] - torch.arange(N)
    near = (probability * (distance < 64)).sum(-1).mean()
    sink = probability[:, 0].mean()
    assert near > 0.3 and sink > 0.02
    assert near + sink > 0.75


def test_vertical_heads_attend_to_the_same_few_tokens() -> None:
    probability = exact_probability(Group(N, DIM, 0), "vertical")
    top = probability.mean(0).topk(14)
    assert top.values.sum() > 0.8
    far = top.indices < N - 256
    assert far.sum() >= 5  # not a window
    assert (probability[:, top.indices[:3]].median(0).values > 0.01).all()  # for most queries, not for one alone


def test_slash_heads_attend_at_fixed_distances() -> None:
    probability = exact_probability(Group(N, DIM, 0), "slash")
    for offset in ARCHETYPES["slash"].offsets:
        keys = torch.arange(N - 128, N) - offset
        at = probability[torch.arange(128), keys].mean()
        beside = probability[torch.arange(128), keys - 100].mean()
        assert at > 0.01 and at > 20 * beside


def test_topic_heads_attend_to_whole_segments() -> None:
    probability = exact_probability(Group(16 * N, DIM, 0), "topic")
    segments = probability.unflatten(-1, (-1, SEGMENT)).sum(-1).mean(0)
    best = segments.topk(6).values.sum()
    assert best > 0.8  # of 128 segments
    assert probability.mean(0).max() < 0.02  # no single token


def test_flexprefill_sees_the_archetypes() -> None:
    """Topic heads come out query-aware, the others vertical-slash; sharper heads keep fewer blocks."""
    n = 8192
    densities: dict[float, float] = {}
    for sharpness in (0.9, 1.4):
        inputs = structured_inputs(n, 8, 2, DIM, sharpness=sharpness)
        selection = select_blocks(inputs.query, inputs.key, FlexPrefillConfig())
        aware = (selection.js_distance[0] < 0.1).tolist()
        assert aware == [archetype_of(head) == "topic" for head in range(8)]
        densities[sharpness] = selection.density().mean().item()
    assert 0.2 < densities[1.4] < densities[0.9] < 0.6


def test_the_table_gives_the_density_it_promises() -> None:
    inputs = structured_inputs(4096, 32, 8, DIM, sharpness=sharpness_of("sharpened", 4096))
    selection = select_blocks(inputs.query, inputs.key, FlexPrefillConfig())
    assert selection.density().mean().item() == pytest.approx(0.76, abs=0.02)


def test_sharpness_between_and_beyond_the_lengths_of_the_table() -> None:
    assert sharpness_of("sharpened", 8192) == SHARPNESS[8192]
    assert sharpness_of("sharpened", 100) == SHARPNESS[4096]
    assert sharpness_of("sharpened", 2**20) == SHARPNESS[262144]
    middle = sharpness_of("sharpened", int(2**0.5 * 16384))
    assert middle == pytest.approx((SHARPNESS[16384] + SHARPNESS[32768]) / 2, rel=1e-4)
    assert {sharpness_of("fixed", n) for n in (100, 8192, 2**20)} == {FIXED_SHARPNESS}
