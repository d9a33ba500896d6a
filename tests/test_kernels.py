"""The Triton kernels, by Triton's interpreter, against the plain reference.

The interpreter multiplies bf16 matrices wrongly (it reads their bits as integers), so bf16 is tested on the GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_flexprefill import oracle_select
from workloads import random_qk, structured_qk

from flexprefill_fa import BlockSelection, FlexPrefillConfig
from flexprefill_fa.grid import next_power_of_2
from flexprefill_fa.index_lists import both_lists
from flexprefill_fa.masks.flexprefill import reference
from flexprefill_fa.masks.last_queries import first_of
from flexprefill_fa.masks.selector import select_plain

if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels run there, see test_gpu.py", allow_module_level=True)
kernels = pytest.importorskip("flexprefill_fa.masks.flexprefill.kernels")
coverage = pytest.importorskip("flexprefill_fa.kernels.coverage").coverage

NEAR_TIE = 1e-5
PADDING = {"none": (None, None), "left": ([0, 70], None), "right": (None, [300, 233]), "both": ([64, 5], [200, 300])}
CASES = [  # kv_len, q_len, head_dim, block_size, dtype, padding, workload, tau
    (321, 321, 80, 64, torch.float16, "none", structured_qk, 0.6),
    (330, 330, 16, 64, torch.float32, "left", structured_qk, 0.6),
    (300, 300, 32, 64, torch.float32, "right", random_qk, 0.0),
    (320, 320, 16, 64, torch.float16, "both", structured_qk, 0.6),
    (333, 129, 16, 64, torch.float32, "none", random_qk, 0.6),
    (330, 127, 24, 64, torch.float32, "left", structured_qk, 0.0),
    (300, 1, 16, 64, torch.float32, "none", random_qk, 0.0),
    (400, 400, 160, 128, torch.float32, "none", structured_qk, 0.6),
]


def as_tensor(values: list[int] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])))
@pytest.mark.parametrize("variant", ["published", "paper"])
def test_kernels_select_what_the_reference_selects(case: tuple, variant: str) -> None:
    kv_len, q_len, head_dim, block_size, dtype, padding, make, tau = case
    starts, lengths = PADDING[padding]
    batch = 1 if padding == "none" else 2
    query, key = (x.to(dtype) for x in make(batch, 2, 1, q_len, kv_len, head_dim, seed=kv_len))
    settings: dict[str, Any] = {
        "gamma": 0.8,
        "tau": tau,
        "min_budget": block_size,
        "max_budget": 4 * block_size if tau else None,
        "block_size": block_size,
        "variant": variant,
    }
    place = as_tensor(starts), as_tensor(lengths)
    expected = select_plain(query, key, *place, FlexPrefillConfig(**settings))
    got = kernels.select(query, key, *place, FlexPrefillConfig(**settings), zero_tails=True)
    if not all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True)):
        # Only a decision that fp32 summation order can turn may differ.
        margin = oracle_select(query, key, starts=starts, lengths=lengths, **settings).margin
        dense = [BlockSelection(*both_lists(x), q_len, kv_len, block_size).to_dense() for x in (got, expected)]
        unequal = (dense[0] != dense[1]).any(-1).any(-1).numpy()
        assert (margin[unequal] < NEAR_TIE).all(), (unequal, margin)
    torch.testing.assert_close(got[3], expected[3], atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 3, 5, 7])
def test_every_number_of_heads_per_kv_head(groups: int) -> None:
    """Tiles hold one, two or four heads of a kv group, and may hold fewer."""
    query, key = structured_qk(1, 2 * groups, 2, 140, 140, 16, seed=groups)
    config = FlexPrefillConfig(gamma=0.8, tau=0.3, min_budget=64, block_size=64, variant="paper")
    expected = select_plain(query, key, None, None, config)
    got = kernels.select(query, key, None, None, config, zero_tails=True)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def test_padding_is_no_coverage() -> None:
    """Where no sum crosses the threshold every token counts, but not the padding."""
    query, key = structured_qk(1, 1, 1, 1000, 1000, 16, seed=1)
    config = FlexPrefillConfig(gamma=1.0, tau=0.0, min_budget=64, max_budget=960, block_size=64)
    place = None, torch.tensor([500])
    expected = select_plain(query, key, *place, config)
    got = kernels.select(query, key, *place, config, zero_tails=True)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def test_more_blocks_than_a_row_can_count() -> None:
    key = torch.zeros(1, 1, 1, 16).expand(1, 1, 2**21, 16)
    with pytest.raises(ValueError, match=r"at most 32767 key blocks of 64 tokens .* got 32768"):
        kernels.select(key[:, :, :1], key, None, None, FlexPrefillConfig(block_size=64))


def test_everything_partial_and_everything_kept() -> None:
    query, key = random_qk(1, 2, 1, 200, 200, 16)
    config = FlexPrefillConfig(gamma=1.0, min_budget=64, block_size=64)
    for all_partial in (False, True):
        got = kernels.select(query, key, None, None, config, all_partial=all_partial, zero_tails=True)
        expected = select_plain(query, key, None, None, config, all_partial=all_partial)
        assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))
    assert got[1].sum() == 0 and got[0].sum() == 2 * 4 * 5 // 2


def test_lists_are_written_into_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave unwritten is never read: poisoned scratch memory changes nothing."""
    query, key = structured_qk(1, 2, 1, 300, 300, 16)
    config = FlexPrefillConfig(gamma=0.8, tau=0.6, min_budget=64, block_size=64)
    expected = kernels.select(query, key, None, None, config, zero_tails=True)
    clean = torch.empty

    def poisoned(*shape, **kwargs):
        tensor = clean(*shape, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    got = kernels.select(query, key, None, None, config, zero_tails=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def coverage_cases() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [6, 301] and thresholds: heavy tails, ties, zeros, a sum that is never reached."""
    scores = torch.rand(6, 301) ** 8
    scores[1] = 0.25  # ties: the first ones in order
    scores[2, 5:] = 0
    scores[3] = 0  # never reaches its threshold
    scores[4] = torch.randint(0, 4, (301,)) / 8  # ties at the crossing value, sums exact
    threshold = scores.double().sum(-1).mul(0.7).float()
    threshold[1], threshold[3], threshold[4] = 20.0, 1.0, 9.0
    return scores, threshold


def members(scores: torch.Tensor, prefix: Any) -> torch.Tensor:
    bits, place = scores.view(torch.int32), torch.arange(scores.shape[1])
    value, cut = prefix.value[:, None], prefix.cut[:, None]
    return (bits > value) | ((bits == value) & (place <= cut))


@pytest.mark.parametrize("keep_crossing", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["one program per row", "many programs"])
def test_coverage_equals_a_sorted_cumulative_sum(
    keep_crossing: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared:
        for name, value in (("SHORT", 0), ("LINE", 64), ("TILE", 64)):
            monkeypatch.setattr(f"flexprefill_fa.kernels.coverage.{name}", value)
    scores, threshold = coverage_cases()
    prefix = coverage(scores, threshold, keep_crossing=keep_crossing)
    member = members(scores, prefix)
    for row in range(6):
        expected, order = reference.coverage_prefix(
            scores[row : row + 1].double(), threshold[row].item(), keep_crossing=keep_crossing
        )
        assert prefix.length[row] == expected[0]
        assert torch.equal(member[row], first_of(order, expected)[0])


@pytest.mark.parametrize("shared", [False, True], ids=["one program per row", "many programs"])
def test_coverage_reads_the_causal_part_alone(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of a causal matrix: what lies behind a line's width may hold anything; rows left out are not touched."""
    if shared:
        for name, value in (("SHORT", 0), ("TILE", 32)):
            monkeypatch.setattr(f"flexprefill_fa.kernels.coverage.{name}", value)
    lines, line, first_width = 17, 19, 3
    scores = torch.rand(3, lines, line) ** 4
    causal = torch.arange(line) < first_width + torch.arange(lines)[:, None]
    poisoned = torch.where(causal, scores, float("inf"))
    goal = (scores * causal).sum((-2, -1)) * 0.6
    active = torch.tensor([1, 0, 1], dtype=torch.int32)
    prefix = coverage(poisoned.flatten(1), goal, keep_crossing=True, active=active, line=line, first_width=first_width)
    clean = torch.where(causal, scores, 0).flatten(1)
    for row in (0, 2):
        expected, order = reference.coverage_prefix(clean[row : row + 1].double(), goal[row].item(), keep_crossing=True)
        assert prefix.length[row] == expected[0]
        assert torch.equal(members(clean, prefix)[row], first_of(order, expected)[0])


@pytest.mark.timeout(900)  # without Triton's cache and beside others
def test_kernels_compile_for_a_smaller_gpu() -> None:
    """For sm_80, without one: every kernel fits in the 163 KB of shared memory of an A100."""
    script = Path(__file__).with_name("cross_compile.py")
    root = script.parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    run = subprocess.run([sys.executable, str(script), "80"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({row["kernel"] for row in rows}) == 27
    too_large = [row for row in rows if row["shared"] > 163 * 1024]
    assert not too_large


def test_powers_of_two_are_tritons() -> None:
    import triton

    for n in (*range(1, 300), 2**31 - 1, 2**31):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
