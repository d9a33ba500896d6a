"""Rows of `python -m bench peers` on the CPU: of stand-ins, of broken ones, and of this package beside them."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_packages import (
    FLASH,
    FLASH_PEER,
    FLEX,
    FLEX_PEER,
    SELECTORS,
    both,
    forget_peers,
    make_package,
    rows_of,
    run,
    write,
)

import bench.attention
from bench.check import no_better_than_zeros, reference, relative_error
from bench.peer_rows import PeerBenchmark, density_of_ratio
from bench.peers import PEERS as ADAPTERS
from bench.peers.base import Peer
from bench.planning import Plan
from bench.speed_tables import PEERS
from bench.tables import line_of
from flexprefill_fa import FlexPrefillConfig, sparse_prefill_attention


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    forget_peers()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make_package(tmp_path / "checkout")


def taken(bench: PeerBenchmark, folder: Path, *peers: Peer) -> list[dict[str, Any]]:
    return [row for peer in peers or (FLEX_PEER, FLASH_PEER) for row in bench.peer_rows(folder, peer)]


def check_ours(ours: list[dict[str, Any]]) -> None:
    assert [(row["selector"], row["kernel"]) for row in ours] == [
        (None, "sdpa"),
        (None, "CPU"),
        ("flexprefill", "CPU"),
        ("flashprefill", "CPU"),
    ]
    for row in ours:
        assert "error" not in row and row["check_error"] <= row["check_allowed"]
        assert row["kind"] == "peers" and row["gpu"] and row["commit"] and row["torch"] == torch.__version__
    assert [row["implementation"] for row in ours[2:]] == ["flexprefill_fa"] * 2
    assert ours[2]["density"] < 1 and ours[2]["dense_error"] > 0.001  # really sparse


@pytest.fixture(scope="module")
def measured() -> tuple[PeerBenchmark, list[dict[str, Any]]]:
    """512 tokens with this package's rows."""
    plan = Plan(
        lengths="512",
        selectors=",".join(SELECTORS),
        backends="CPU",
        heads=4,
        kv_heads=2,
        head_dim=32,
        dtype="float32",
        workload="sharpened",
        device="cpu",
        seed=0,
        repeats=2,
        seconds=0.1,
    )
    bench = PeerBenchmark(plan, 512, print)
    return bench, list(bench.rows())


def test_a_package_is_timed_and_checked_beside_ours(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "peers.jsonl"
    result = run(out, *both(package), "--lengths", "512,600")
    assert result.exit_code == 0, result.output
    assert str(package) not in sys.path
    ours, peers = rows_of(out)
    assert [row["length"] for row in ours] == [512] * 4 + [600] * 4
    check_ours(ours[:4])
    check_ours(ours[4:])
    assert [(row["length"], row["function"], row["module"], row["selector"]) for row in peers] == [
        (length, *found)
        for length in (512, 600)
        for found in (
            ("flex_prefill_attention", "flex_prefill.ops.flex_prefill_attention", "flexprefill"),
            ("flash_prefill", "ops.flashprefill_native_forward", "flashprefill"),
        )
    ]
    for row in peers:
        dense = ours[4 * (row["length"] == 600)]
        assert "error" not in row and row["dense_error"] < 1e-5 and row["total_ms"] > 0
        assert len(row["peer_digest"]) == 12
        assert row["speedup_sdpa"] == pytest.approx(dense["total_ms"] / row["total_ms"], rel=0.02)
        conditions = ("length", "batch", "heads", "kv_heads", "head_dim", "dtype", "workload", "seed", "gpu", "commit")
        assert all(row[name] == dense[name] for name in conditions)
    assert [(row["implementation"], row["peer_version"]) for row in peers[:2]] == [
        ("FlexPrefill", "1.2"),
        ("FlashPrefill", None),
    ]
    assert peers[0]["settings"] == ours[2]["settings"] and peers[1]["settings"] == ours[3]["settings"]
    assert peers[0]["computational_ratio"] == 0.625 and peers[0]["density"] == 1
    assert "density" not in peers[1] and peers[1]["peer_settings"]["min_budget"] == 0

    table = PEERS.markdown([*ours, *peers])
    assert table in result.stdout and "4 heads, kv_heads 2" in table
    flex = "flexprefill, gamma 0.5, tau 0.05, min_budget 200, max_budget 400"
    flash = "flashprefill, alpha 0.4, sink_blocks 1, window_blocks 2, last_full_blocks 3"
    lines = [re.split(r" *\| *", line)[1:5] for line in table.splitlines() if line.startswith(("| 5", "| 6"))]
    assert [line[:3] for line in lines] == [
        [length, *place]
        for length in ("512", "600")
        for place in (
            ["dense", "SDPA"],
            ["dense", "FlexAttention CPU"],
            [flex, "flexprefill_fa CPU"],
            [flex, "FlexPrefill"],
            [flash, "flexprefill_fa CPU"],
            [flash, "FlashPrefill"],
        )
    ]
    assert [line[3] for line in lines if line[2] in ("FlexPrefill", "FlashPrefill")] == ["1.000", "-"] * 2
    assert "FlexPrefill 1.2, `flex_prefill.ops.flex_prefill_attention.flex_prefill_attention`, digest" in table
    assert "FlashPrefill, `ops.flashprefill_native_forward.flash_prefill`, digest" in table
    assert "attention_sink 1" in table


def test_dense_error_is_that_of_the_sampled_rows(
    measured: tuple[PeerBenchmark, list[dict[str, Any]]], package: Path
) -> None:
    write(package, flex=FLEX.replace("out = dense(q, k, v)", "out = dense(q, k, v); out[:, 1:] *= 1.25"))
    bench, ours = measured
    (flex, _) = taken(bench, package)
    assert 0.2 < flex["dense_error"] < 0.25  # the first row is right
    inputs, _ = bench.plan.inputs(512)
    exact = reference(inputs, None)
    for row, config in zip(ours[2:], bench.plan.configs, strict=True):
        out = sparse_prefill_attention(inputs.query, inputs.key, inputs.value, config, dense="never")
        assert row["dense_error"] == pytest.approx(relative_error(out[:, :, exact.positions], exact.dense), abs=1e-5)


def wrong(code: str) -> str:
    return FLEX.replace("out = dense(q, k, v)", f"out = dense(q, k, v); {code}")


BROKEN = {
    "an import that fails": (FLEX.replace("from .common", "from .missing"), "ModuleNotFoundError: No module named"),
    "no Python": (FLEX + "def (:\n", "SyntaxError: "),
    "an import that exits": ("raise SystemExit('no GPU')\n" + FLEX, "SystemExit: no GPU"),
    "a call that fails": (FLEX.replace("out = dense", "raise RuntimeError('no | kernel')\n    out ="), "RuntimeError"),
    "another shape": (wrong("out = q.transpose(1, 2)"), "ValueError: its output must"),
    "NaN": (wrong("out = q * float('nan')"), "ValueError: its output is not finite"),
    "another signature": (FLEX.replace("gamma, tau=0", "gamma, tau0=0"), "unexpected keyword argument 'tau'"),
    "another name": (FLEX.replace("def flex", "def flux"), "AttributeError: module"),
    "no ratio returned": (FLEX.replace("(out, ratio) if return_computational_ratio else out", "out"), "ValueError: "),
    "zeros": (wrong("out = 0 * q"), "of the sampled rows of head (0, "),
    "zeros after the first row": (wrong("out[:, 1:] = 0"), "of the sampled rows of head (0, "),
    "zeros in one head": (wrong("out[:, :, 2] = 0"), "100% of the sampled rows of head (0, 2) are no nearer"),
    "noise": (wrong("out = torch.randn_like(q)"), "of the sampled rows of head (0, "),
    "other heads": (wrong("out = out.flip(2)"), "of the sampled rows of head (0, "),
    "interleaved heads": (wrong("out = out[:, :, [0, 2, 1, 3]]"), "of the sampled rows of head (0, "),
    "too many blocks": (
        wrong("ratio = 1.0"),
        "ValueError: its ratio 1 means a density of 1.6, which must be in (0, 1]",
    ),
    "no ratio": (wrong("ratio = float('nan')"), "ValueError: its ratio nan means a density of nan"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_fails_is_a_row_with_the_error_and_the_rest_goes_on(
    what: str, measured: tuple[PeerBenchmark, list[dict[str, Any]]], package: Path
) -> None:
    text, message = BROKEN[what]
    write(package, flex=text)
    bench, ours = measured
    broken, whole = taken(bench, package)
    assert message in broken["error"] and broken["module"] == FLEX_PEER.module
    assert broken["settings"] == dataclasses.asdict(bench.plan.configs[0])
    assert not [name for name in broken if name.endswith("_ms") or name.startswith("speedup")]
    assert "error" not in whole and whole["total_ms"] > 0
    shown = f"error: {broken['error']}".replace("|", "/")
    (line,) = [line for line in PEERS.markdown([*ours, broken, whole]).splitlines() if shown in line]
    assert " | FlexPrefill | " in line and f" | {shown} | - | - | - |" in line, "no times"
    assert "WRONG: " in line_of(broken)


def test_a_head_that_keeps_what_ours_keeps_is_not_wrong_for_keeping_little(
    measured: tuple[PeerBenchmark, list[dict[str, Any]]],
) -> None:
    bench = measured[0]
    found = bench.references[bench.plan.configs[0]]
    little = dataclasses.replace(found, dense=-found.expected)  # further from dense attention than zeros are
    out = torch.zeros_like(bench.inputs.query)
    out[:, :, found.positions] = found.expected.float()
    assert no_better_than_zeros(out, little) is None
    half = out.clone()
    half[:, 3, found.positions[16:]] = 0
    assert "50% of the sampled rows of head (0, 3) are no nearer" in str(no_better_than_zeros(half, little))
    out[:, 3, found.positions[17:]] = 0
    assert no_better_than_zeros(out, little) is None


def test_the_exit_code_tells_whose_output_was_wrong(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(package, flash=FLASH.replace("out.copy_(dense(q, k, v))", "out[:, 1:].copy_(dense(q, k, v)[:, 1:])"))
    out = tmp_path / "peers.jsonl"
    assert run(out, *both(package)).exit_code == 2
    ours, (flex, flash) = rows_of(out)
    check_ours(ours)
    assert "error" not in flex and flash["error"] == "ValueError: its output is not finite"

    def nan(query: Any, *_: Any, **__: Any) -> torch.Tensor:
        return query * float("nan")

    monkeypatch.setattr(bench.attention, "sparse_prefill_attention", nan)
    assert run(out, *both(package)).exit_code == 1


def test_a_peer_on_another_stream_is_not_captured(
    measured: tuple[PeerBenchmark, list[dict[str, Any]]], package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, captures = measured[0].watch, []
    eager = watch.eager
    monkeypatch.setattr(watch, "graph", lambda call: captures.append(watch.captures) or eager(call))
    for there in (True, False, True):
        (row,) = taken(measured[0], package, dataclasses.replace(FLASH_PEER, on_current_stream=there))
        assert "error" not in row and set(captures) == {there}
        captures.clear()
    assert [name for name, peer in ADAPTERS.items() if not peer.on_current_stream] == ["spargeattn"]


def test_no_row_of_ours_comes_after_a_peer(package: Path, tmp_path: Path) -> None:
    """A peer may leave anything changed, such as the default dtype that the next length's inputs are drawn in."""
    write(package, flex="import torch\n\ntorch.set_default_dtype(torch.float64)\n" + FLEX)
    out = tmp_path / "peers.jsonl"
    assert run(out, *both(package), "--lengths", "512,600").exit_code == 0
    assert torch.get_default_dtype() == torch.float64
    paths = [json.loads(line)["path"] for line in out.read_text().splitlines()]
    assert paths == ["dense", "dense", "sparse", "sparse"] * 2 + ["peer"] * 4


def test_a_peers_folder_and_prints_reach_nothing_of_ours(
    measured: tuple[PeerBenchmark, list[dict[str, Any]]], package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its import path holds its root alone, and only while it runs; stdout stays for JSON lines."""
    text = "import sys\n" + FLEX.replace("blocks =", "print('path', sys.path[:2])\n    blocks =")
    checkout = package.parent / "other"
    write(checkout, flex=text, flash=FLASH)
    before = list(sys.path)
    assert not any("error" in row for row in taken(measured[0], checkout))
    assert sys.path == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "flex_prefill is imported" in captured.err and "flex_prefill is called" in captured.err
    assert f"path {[str(checkout), before[0]]}" in captured.err


@pytest.mark.parametrize("given", [True, False])
def test_selectors_without_a_peer_are_measured_alone(given: bool, tmp_path: Path) -> None:
    write(tmp_path / "flash", flash=FLASH)
    out = tmp_path / "peers.jsonl"
    result = run(out, *(("--peer", f"flashprefill={tmp_path / 'flash'}") if given else ()))
    assert result.exit_code == 0, result.output
    assert "flexprefill is measured without a peer" in result.stderr
    assert ("flashprefill is measured without a peer" in result.stderr) != given
    ours, peers = rows_of(out)
    assert [row["selector"] for row in ours] == [None, None, "flexprefill", "flashprefill"]
    assert [row["implementation"] for row in peers] == ["FlashPrefill"] * given


def test_density_of_a_ratio() -> None:
    assert density_of_ratio((512 + 1) / (2 * 512), 65536, 128) == 1
    assert density_of_ratio(0.5 * (1 + 2**-22) * 513 / 512, 65536, 128) == 1  # of a mean in fp32
    assert density_of_ratio(5 / 16, 500, 128) == 0.5
    for ratio in (0.0, -0.1, 0.51, 1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"its ratio .* means a density of .*, which must be in \(0, 1\]"):
            density_of_ratio(ratio, 65536, 128)


@pytest.fixture
def lines(measured: tuple[PeerBenchmark, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Dense rows, one of this package and the same as a peer's."""
    dense = measured[1][:3]
    peer = dense[2] | {"path": "peer", "backend": None, "kernel": None, "implementation": "p", "module": "p"}
    return [*dense, peer | {"function": "flash_prefill", "peer_version": None, "peer_digest": "0"}]


def test_a_later_row_takes_an_earlier_ones_place(lines: list[dict[str, Any]]) -> None:
    failed = {name: value for name, value in lines[-1].items() if not name.endswith("_ms")} | {"error": "no kernel"}
    table = PEERS.markdown([*lines[:-1], failed, lines[-1]])
    assert table.count("| p |") == 1 and "no kernel" not in table
    assert PEERS.markdown([]) == ""


def test_each_setting_of_a_selector_has_its_lines(lines: list[dict[str, Any]]) -> None:
    settings = lines[-1]["settings"]
    more = [row | {"settings": settings | {"gamma": 0.9}} for row in lines[2:]]
    usual = [row | {"settings": dataclasses.asdict(FlexPrefillConfig())} for row in lines[2:]]
    table = PEERS.markdown([*lines, *more, *usual])
    found = [line.split(" | ")[1:3] for line in table.splitlines() if line.startswith("| 512 | flex")]
    rest = "tau 0.05, min_budget 200, max_budget 400"
    methods = [f"flexprefill, gamma 0.5, {rest}", f"flexprefill, gamma 0.9, {rest}", "flexprefill"]
    assert found == [[method, who] for method in methods for who in ("flexprefill_fa CPU", "p")]
    assert f"flexprefill, gamma 0.9, {rest} of p: " in line_of(more[-1])


def test_auto_is_a_line_of_its_own(lines: list[dict[str, Any]]) -> None:
    table = PEERS.markdown([*lines, lines[2] | {"backend": "auto"}])
    assert table.count("| flexprefill_fa auto (sparse CPU) |") == 1 and "| flexprefill_fa CPU |" in table
