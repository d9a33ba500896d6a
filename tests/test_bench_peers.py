"""`python -m bench peers` on the CPU: a small package with both published functions, broken ones, and none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.peer_tables import peer_tables
from bench.peers import density_of_ratio, find_peers, importable, load

SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "float32", "--device", "cpu")
FAST = ("--repeats", "2", "--seconds", "0.1", "--lengths", "512", "--backends", "CPU")
SELECTORS = "flexprefill:min_budget=128+gamma=0.5,flashprefill:sink_blocks=1+window_blocks=1+last_full_blocks=0"

DENSE = """
import torch


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)
"""
FLEX = """
from .common import dense


def flex_prefill_attention(q, k, v, gamma, tau=0, min_budget=None, max_budget=None, gqa_interleave=False,
                           softmax_scale=None, block_size=128, return_computational_ratio=False):
    assert (gamma, tau, min_budget, max_budget, block_size) == (0.5, 0.1, 128, None, 128)
    assert q.shape == (1, 512, 4, 32) and k.shape == v.shape == (1, 512, 2, 32) and q.is_contiguous()
    out = dense(q, k, v)
    return (out, 0.625) if return_computational_ratio else out
"""
FLASH = """
from dense_peer.common import dense


def flash_prefill(q, k, v, out, block_size, attention_sink, window_size, alpha, last_n_block_full, min_budget=256):
    assert (block_size, attention_sink, window_size, alpha, last_n_block_full) == (128, 1, 1, 0.1, 0)
    out.copy_(dense(q, k, v))
"""


def write(folder: Path, **files: str) -> None:
    """Modules by their name, `__` for a folder."""
    for name, text in files.items():
        file = folder / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for file in list(folder.rglob("*.py")):
        (file.parent / "__init__.py").touch()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A checkout that holds the package `dense_peer`."""
    root = tmp_path / "checkout"
    write(root / "dense_peer", common=DENSE, flex=FLEX, ops__flash=FLASH)
    (root / "dense_peer" / "__init__.py").write_text('__version__ = "1.2"\n')
    return root


def run(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["peers", *SMALL, *FAST, "--selectors", SELECTORS, "--out", str(out), *arguments])


def rows_of(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(this package's and dense rows, the peers' rows)."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [row for row in rows if row["path"] != "peer"], [row for row in rows if row["path"] == "peer"]


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


def test_a_package_is_timed_and_checked_beside_ours(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "peers.jsonl"
    result = run(out, "--package", str(package))
    assert result.exit_code == 0, result.output
    ours, peers = rows_of(out)
    check_ours(ours)
    assert [(row["function"], row["module"], row["selector"]) for row in peers] == [
        ("flex_prefill_attention", "dense_peer.flex", "flexprefill"),
        ("flash_prefill", "dense_peer.ops.flash", "flashprefill"),
    ]
    for row in peers:
        assert "error" not in row and row["dense_error"] < 1e-5 and row["total_ms"] > 0
        assert (row["implementation"], row["peer_version"], len(row["peer_digest"])) == ("dense_peer", "1.2", 12)
        assert row["speedup_sdpa"] == pytest.approx(ours[0]["total_ms"] / row["total_ms"], rel=0.02)
        conditions = ("length", "batch", "heads", "kv_heads", "head_dim", "dtype", "workload", "seed", "gpu", "commit")
        assert all(row[name] == ours[0][name] for name in conditions)
    assert peers[0]["computational_ratio"] == 0.625 and peers[0]["density"] == 1
    assert "density" not in peers[1] and peers[1]["settings"]["min_budget"] == 256
    assert "flash_prefill: dense_peer.ops.flash (" in result.stderr.replace("\n", "")
    assert not [name for name in sys.modules if name.startswith("dense_peer")]
    assert str(package) not in sys.path

    table = peer_tables([*ours, *peers])
    assert table in result.stdout
    for part in ("4/2 heads", "512", "| flexprefill | dense_peer | 1.000 |", "| flashprefill | dense_peer | - |"):
        assert part in table
    assert "dense_peer 1.2, `dense_peer.ops.flash.flash_prefill`, digest" in table and "gamma 0.5" in table


BROKEN = {
    "an import that fails": (FLEX.replace("from .common", "from .missing"), "ModuleNotFoundError: No module named"),
    "no Python": (FLEX + "def (:\n", "SyntaxError: "),
    "an import that exits": ("raise SystemExit('no GPU')\n" + FLEX, "SystemExit: no GPU"),
    "a call that fails": (FLEX.replace("out = dense", "raise RuntimeError('no | kernel')\n    out ="), "RuntimeError"),
    "another shape": (FLEX.replace("out = dense(q, k, v)", "out = q.transpose(1, 2)"), "ValueError: its output must"),
    "NaN": (FLEX.replace("out = dense(q, k, v)", "out = q * float('nan')"), "ValueError: its output is not finite"),
    "another signature": (FLEX.replace("gamma, tau=0", "gamma, tau0=0"), "TypeError: "),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_fails_is_a_row_with_the_error_and_the_rest_goes_on(what: str, package: Path, tmp_path: Path) -> None:
    text, message = BROKEN[what]
    write(package / "dense_peer", flex=text)
    out = tmp_path / "peers.jsonl"
    result = run(out, "--package", str(package))
    assert result.exit_code == 2, result.output
    ours, (broken, whole) = rows_of(out)
    check_ours(ours)
    assert broken["error"].startswith(message) and broken["module"] == "dense_peer.flex"
    assert not [name for name in broken if name.endswith("_ms")]
    assert "error" not in whole and whole["total_ms"] > 0
    shown = f"error: {broken['error']}".replace("|", "/")
    assert f"| flexprefill | dense_peer | - | - | {shown} |" in peer_tables([*ours, broken, whole])


def test_outputs_that_are_not_written_are_an_error(package: Path, tmp_path: Path) -> None:
    write(
        package / "dense_peer", ops__flash=FLASH.replace("out.copy_", "out[:, 1:].copy_").replace("v))", "v)[:, 1:])")
    )
    out = tmp_path / "peers.jsonl"
    assert run(out, "--package", str(package)).exit_code == 2
    assert rows_of(out)[1][1]["error"] == "ValueError: its output is not finite"


@pytest.mark.parametrize(
    ("folder", "code", "message"),
    [
        (None, 0, "no --package folder with another implementation: this package and dense attention are measured"),
        ("nowhere", 2, "error: there is no folder "),
        ("empty", 2, "defines flex_prefill_attention or flash_prefill: this package"),
    ],
)
def test_without_a_package_ours_is_measured_alone(folder: str | None, code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "peers.jsonl"
    options = ("--package", str(tmp_path / folder)) if folder else ()
    result = run(out, *options)
    assert result.exit_code == code, result.output
    assert message in result.stderr.replace("\n", "")
    ours, peers = rows_of(out)
    check_ours(ours)
    assert peers == []


def test_functions_are_found_by_name_without_importing(tmp_path: Path) -> None:
    boom = "raise AssertionError('imported')\ndef flash_prefill(q):\n    pass\n"
    write(tmp_path / "one", deep__er__b=boom, a=boom.replace("flash_prefill", "flash_prefill_decode"))
    (only,) = find_peers(tmp_path / "one")
    assert (only.module, only.implementation, only.root) == ("one.deep.er.b", "one", tmp_path.resolve())
    write(tmp_path / "one", z=boom, __hidden=boom)
    write(tmp_path / "one" / ".git", y=boom)
    (nearest,) = find_peers(tmp_path)
    assert nearest.module == "one.z" and [file.name for file in nearest.also] == ["b.py"]
    (tmp_path / "one" / "z.py").write_text("")
    (tmp_path / "one" / "__init__.py").write_text(boom)
    assert find_peers(tmp_path / "one")[0].module == "one"


def test_a_name_that_is_taken_is_not_mistaken_for_the_peer(tmp_path: Path) -> None:
    write(tmp_path / "bench", attention="def flash_prefill(q):\n    pass\n")
    found = find_peers(tmp_path)
    with importable(tmp_path, found), pytest.raises(ImportError, match=r"bench\.attention is .*not the attention\.py"):
        load(found[0])


def test_density_of_a_ratio() -> None:
    assert density_of_ratio((512 + 1) / (2 * 512), 65536, 128) == pytest.approx(1)
    assert density_of_ratio(5 / 16, 500, 128) == 0.5


def test_a_later_row_takes_an_earlier_ones_place(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.jsonl"
    run(out)
    dense = rows_of(out)[0]
    peer = dense[2] | {"path": "peer", "backend": None, "kernel": None, "implementation": "p", "module": "p"}
    peer |= {"function": "flash_prefill", "peer_version": None, "peer_digest": "0"}
    failed = {name: value for name, value in peer.items() if not name.endswith("_ms")} | {"error": "no kernel"}
    table = peer_tables([*dense, failed, peer])
    assert table.count("| p |") == 1 and "no kernel" not in table
    assert peer_tables([]) == ""
