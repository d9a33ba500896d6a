"""Drawn shapes, paddings, inputs and settings, for every selector: laws, the rule itself, and the kernels beside it.

A few cases here; `make soak` draws 10,000, and new ones each time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from every_selector import check_laws, define_documented, example, names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from workloads import blocky_qk, needle_qk, random_qk, structured_qk

from flexprefill_fa import BlockSelection, get_selector, select_blocks
from flexprefill_fa.grid import Grid, real_ranges, visible_blocks
from flexprefill_fa.masks.element import element_of
from flexprefill_fa.masks.selector import kernels_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(0 if "SOAK" in os.environ else 300)]

SOAK = int(os.environ.get("SOAK", "0"))  # cases of all selectors together
SELECTORS = names()
WITH_KERNELS = ["flashprefill", "flexprefill", "peakprefill", "vertical_slash"]
KERNEL_SHARE = 20  # one of so many cases also goes through Triton's interpreter, which takes a second each
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def documented_selector(tmp_path_factory: pytest.TempPathFactory) -> None:
    define_documented(tmp_path_factory.mktemp("documented"))


def drawn(cases: int) -> Any:
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=not SOAK,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass(frozen=True)
class Case:
    """One call of a selector."""

    config: Any
    shape: tuple[int, ...]  # batch, heads, kv heads, queries, keys, head dim
    maker: Any
    dtype: torch.dtype
    seed: int
    scale: float | None
    place: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor]:
        query, key = self.maker(*self.shape, seed=self.seed)
        return query.to(self.dtype), key.to(self.dtype)

    def padding(self) -> tuple[Tensor | None, Tensor | None]:
        starts, lengths = (self.place.get(name) for name in ("starts", "lengths"))
        return tuple(None if x is None else torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))  # pyright: ignore[reportReturnType]


def fields_of(name: str, draw: Any, block_size: int) -> dict[str, Any]:
    """Settings over their whole range; {}: those of `example`, for a selector that is not known here."""

    def between(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    share = st.one_of(st.sampled_from((1.0, 0.5, 0.9)), st.floats(1e-3, 1.0))
    if name == "flexprefill":
        least = draw(st.one_of(st.just(1), st.integers(1, 5 * block_size)))
        most = draw(st.one_of(st.none(), st.integers(max(least, 3 * block_size), 12 * block_size)))
        variant, tau = draw(st.sampled_from(("published", "paper"))), draw(st.sampled_from((0.0, 0.1, 1.0)))
        return {"gamma": draw(share), "tau": tau, "min_budget": least, "max_budget": most, "variant": variant}
    if name == "flashprefill":
        blocks = {"sink_blocks": between(0, 3), "window_blocks": between(1, 4), "last_full_blocks": between(0, 3)}
        return {"alpha": draw(st.one_of(share, st.floats(1e-30, 1e-3))), **blocks}
    if name == "peakprefill":
        kind = draw(st.sampled_from(("clusters", "outliers")))
        count = draw(st.one_of(st.none(), st.integers(1, 16)))
        return {
            "peak": draw(st.floats(1e-4, 0.99)),
            "representatives": kind,
            "per_block": count,
            "variance": draw(st.booleans()),
            "last_full_blocks": between(0, 3),
        }
    if name in ("xattention", "cosa"):
        stride = draw(st.sampled_from([s for s in (1, 2, 8, 16, 64) if block_size % s == 0]))
        return {"threshold" if name == "xattention" else "share": draw(share), "stride": stride}
    if name == "streaming_llm":
        return {"sink": between(0, 300), "window": between(1, 700)}
    if name == "vertical_slash":
        return {"vertical_size": between(1, 500), "slash_size": between(1, 500)}
    return {}


@st.composite
def cases(draw: Any, name: str, longest: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """longest: in blocks."""
    block_size = draw(st.sampled_from((64, 128)))
    edge = st.integers(1, longest).map(lambda n: n * block_size)
    kv_len = draw(
        st.one_of(st.integers(1, longest * block_size), edge, edge.map(lambda n: n - 1), edge.map(lambda n: n + 1))
    )
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    place = {}
    if draw(st.booleans()):
        starts = [draw(st.integers(0, kv_len - 1)) for _ in range(batch)]
        place["starts"] = starts
        if draw(st.booleans()):
            place["lengths"] = [draw(st.integers(1, kv_len - start)) for start in starts]
    shape = batch, kv_heads * groups, kv_heads, q_len, kv_len, draw(st.sampled_from((16, 24, 32)))
    kind: Any = get_selector(name)
    fields = fields_of(name, draw, block_size)
    config = kind(**fields, block_size=block_size) if fields else example(name, block_size)
    maker = draw(st.sampled_from((random_qk, blocky_qk, structured_qk, needle_qk)))
    scale = draw(st.one_of(st.none(), st.floats(0.01, 1.0)))
    return Case(config, shape, maker, draw(st.sampled_from(dtypes)), draw(st.integers(0, 10**6)), scale, place)


def by_rule(case: Case, query: Tensor, key: Tensor, ranges: Tensor) -> Tensor:
    """bool `[B, H, nq, nk]` of the config's own `keep` and `always` or `pattern`, one sequence at a time."""
    config, grid = case.config, Grid(query.shape[2], key.shape[2], case.config.block_size)
    visible = visible_blocks(grid, ranges)[:, None]
    kept = torch.zeros(*query.shape[:2], grid.q_blocks, grid.kv_blocks, dtype=torch.bool)
    pattern = config.pattern(grid, ranges)
    if pattern is not None:
        return pattern[:, None].expand_as(kept) & visible
    scale = query.shape[3] ** -0.5 if case.scale is None else case.scale
    for b, (start, end) in enumerate(ranges.tolist()):
        found = element_of(query[b], key[b], start, end, grid, scale)
        if found is not None:
            element, rows, columns = found
            kept[b, :, rows, columns] = config.keep(element) | config.always(element)
    return kept & visible


def check_diagonal(selection: BlockSelection, kept: Tensor) -> None:
    """Every real query sees its own block."""
    grid = selection.grid
    position = grid.offset + torch.arange(grid.q_len)
    for b, (start, end) in enumerate(selection.ranges.tolist()):
        own = ((position >= start) & (position < end)).nonzero().flatten()
        assert kept[b][:, own // grid.block_size, position[own] // grid.block_size].all()


@pytest.mark.parametrize("name", SELECTORS)
def test_selections_obey_the_laws_and_the_rule(name: str) -> None:
    @drawn(max(10, SOAK // len(SELECTORS)))
    @given(cases(name, 9))
    def check(case: Case) -> None:
        query, key = case.inputs()
        selection = select_blocks(query, key, case.config, scale=case.scale, **case.place)
        check_laws(selection, case.config)
        kept, width = selection.to_dense(), selection.grid.kv_blocks
        check_diagonal(selection, kept)
        for count, indices in (selection.lists[:2], selection.lists[2:]):
            assert indices.shape == (*count.shape, width) and (count >= 0).all() and (count <= width).all()
            assert (indices >= 0).all() and (indices < width).all()
        assert torch.equal(kept, by_rule(case, query, key, selection.ranges))
        partial = select_blocks(query, key, case.config, scale=case.scale, all_partial=True, **case.place)
        assert torch.equal(partial.to_dense(), kept) and not partial.full_kv_num_blocks.any()

    check()


def near_ties(case: Case, query: Tensor, key: Tensor, expected: Tensor, ranges: Tensor) -> Tensor:
    """Cells that the rule turns for queries that differ by rounding."""
    turned = torch.zeros_like(expected)
    size = {torch.float32: 1e-5, torch.float16: 2e-3}[query.dtype]
    for seed in range(8):
        noise = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))
        turned |= by_rule(case, (query.float() * (1 + size * noise)).to(query.dtype), key, ranges) ^ expected
    return turned


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there, see test_gpu*.py")
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_kernels_select_what_the_rule_selects(name: str) -> None:
    """But for near ties. bf16, whose rounding moves more cells, is in the selectors' own tests."""

    @drawn(max(2, SOAK // KERNEL_SHARE // len(WITH_KERNELS)))
    @given(cases(name, 5, (torch.float32, torch.float16)))
    def check(case: Case) -> None:
        query, key = case.inputs()
        place = case.padding()
        got = kernels_of(name)(query, key, *place, case.config, case.scale, False, True)
        ranges = real_ranges(*place, query.shape[0], key.shape[2], query.device)
        lengths = query.shape[2], key.shape[2], case.config.block_size
        selection = BlockSelection.of(got, case.config.diagnostics, query, key, lengths[2], *place)
        check_laws(selection, case.config)
        expected = by_rule(case, query, key, ranges)
        unequal = selection.to_dense() ^ expected
        if unequal.any():
            assert not (unequal & ~near_ties(case, query, key, expected, ranges)).any(), unequal.nonzero()[:5].tolist()

    check()


def test_every_selector_with_kernels_is_here() -> None:
    assert [name for name in SELECTORS if get_selector(name).triton is not None] == WITH_KERNELS


def test_a_broken_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: an operator that drops a block of the diagonal, or adds one of the future."""
    config: Any = example("flashprefill")
    query, key = blocky_qk(1, 2, 1, 300, 300, 16)
    selection = select_blocks(query, key, config)
    kept = selection.to_dense()
    check_diagonal(selection, kept)
    kept[0, 1, 2, 2] = False
    with pytest.raises(AssertionError):
        check_diagonal(selection, kept)
    selection.kv_indices[0, 0, 1, 0] = 4
    with pytest.raises(AssertionError):
        check_laws(selection, config)
