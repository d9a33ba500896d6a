"""The documents' tables: rendered from rows, whole where rows are missing, and the same as what is committed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from bench import RESULTS
from bench.cli import app
from bench.render import BLOCKS, DOCUMENTS, render_document
from bench.speed_tables import attention_tables, demo_table
from bench.ttft_tables import speed_summary
from flexprefill_fa.tools.cli import app as flexprefill
from flexprefill_fa.tools.demo import Answer, DemoResult
from flexprefill_fa.tools.generation import LayerReport, Measurement
from flexprefill_fa.tools.rows import append, commit, latest, read

MARKERS = "\n".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in BLOCKS)


def row(**fields: Any) -> dict[str, Any]:
    conditions = {
        "kind": "attention",
        "device": "cuda",
        "gpu": "NVIDIA H200",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "flash_attn_4": "4.0.0b10",
        "commit": "abc123",
        "date": "2026-11-22",
        "length": 65536,
        "batch": 1,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "workload": "sharpened",
        "repeats": 20,
        "timed_by": {"total_ms": "CUDA graph"},
        "selector": None,
        "settings": None,
        "backend": None,
    }
    return conditions | fields


def dense(kernel: str, total_ms: float, **fields: Any) -> dict[str, Any]:
    return row(path="dense", kernel=kernel, total_ms=total_ms, **fields)


def sparse(backend: str, total_ms: float, **fields: Any) -> dict[str, Any]:
    found = {
        "path": "sparse",
        "selector": "peakprefill",
        "settings": {"peak": 0.2, "per_block": None},
        "kernel": "FLASH" if backend == "auto" else backend,
        "density": 0.09,
        "recall": 0.961,
        "select_ms": 1.5,
        "attend_ms": total_ms - 1.5,
        "speedup_sdpa_flash": 100 / total_ms,
        "speedup_best_dense": 54 / total_ms,
    }
    return row(backend=backend, total_ms=total_ms, **(found | fields))


ROWS = [
    dense("sdpa_flash", 100.0),
    dense("FLASH", 54.0),
    dense("TRITON", 80.0),
    sparse("auto", 5.5),
    sparse("FLASH", 5.0),
    sparse("TRITON", 8.0),
    dense("sdpa_flash", 0.5, length=4096),
    sparse("auto", 0.5, length=4096, path="dense", kernel="FLASH", select_ms=None, attend_ms=None),
    sparse("TRITON", 1.0, length=4096, error="relative error 0.5 of the sampled rows, allowed 0.01"),
]


def cells(table: str, first: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables_of(rows: list[dict[str, Any]]) -> list[str]:
    """A table for dense attention, and one for each selector and settings."""
    return attention_tables(rows, "cuda", "sharpened").split("**Attention")[1:]


def test_attention_tables() -> None:
    dense, sparse = tables_of(ROWS)
    for caption in (dense.splitlines()[0], sparse.splitlines()[0]):
        for part in ("NVIDIA H200", "torch 2.11.0", "flash-attn-4 4.0.0b10", "commit abc123", "2026-11-22", "bfloat16"):
            assert part in caption
        assert "32 heads, kv_heads 8, head_dim 128" in caption and "repeats 20" in caption
    assert "peakprefill, peak 0.2, NVIDIA" in sparse.splitlines()[0] and "per_block" not in sparse
    header = ["tokens", "SDPA flash ms", "FlexAttention FLASH ms", "FlexAttention TRITON ms"]
    assert cells(dense, "tokens") == header
    assert cells(dense, "4,096") == ["4,096", "0.5", "-", "-"] and cells(dense, "65,536")[1:] == ["100", "54", "80"]
    header = ["tokens", "kernel", "density", "recall", "select ms", "attend ms", "total ms"]
    assert cells(sparse, "tokens") == [*header, "x SDPA flash", "x best dense"]
    found = [line.strip("| ").split(" | ") for line in sparse.splitlines() if line.startswith(("| 4,", "| 65,"))]
    assert [line[:2] for line in found] == [
        ["4,096", "auto (dense FLASH)"],
        ["4,096", "TRITON"],
        ["65,536", "auto (sparse FLASH)"],
        ["65,536", "FLASH"],
        ["65,536", "TRITON"],
    ]
    assert found[3][2:] == ["0.090", "0.961", "1.5", "3.5", "5", "20.00x", "10.80x"]
    assert found[4][4:9] == ["1.5", "6.5", "8", "12.50x", "6.75x"] and found[2][6:8] == ["5.5", "18.18x"]
    assert (
        found[0][4:7] == ["-", "-", "0.5"]
        and found[1][6] == "error: relative error 0.5 of the sampled rows, allowed 0.01"
    )


def test_a_later_row_takes_an_earlier_ones_place() -> None:
    both = sparse("TRITON", 7.0, corrected_ms=7.7, tilted_ms=8.4, attend_ms=7.0)
    table = tables_of([*ROWS, both])[1]
    assert "| attend ms | mean correction, of attend | tilted means | total ms |" in table
    assert "| 7 | +10% | +20% | 7 |" in table and "| 8 |" not in table
    assert "mean correction" not in tables_of([*ROWS, sparse("TRITON", 7.0)])[1]
    assert [r["a"] for r in latest([{"a": 1, "b": 0}, {"a": 2, "b": 1}, {"a": 3, "b": 0}], lambda r: r["b"])] == [3, 2]


def test_other_settings_workloads_and_gpus_get_tables_of_their_own() -> None:
    other = [sparse("FLASH", 4.0, settings={"peak": 0.1}), sparse("FLASH", 6.0, gpu="NVIDIA H100")]
    table = attention_tables([*ROWS, *other, sparse("FLASH", 9.0, workload="fixed")], "cuda", "sharpened")
    assert table.count("| tokens |") == 4
    assert "peak 0.1, NVIDIA" in table and "NVIDIA H100" in table
    assert attention_tables(ROWS, "cuda", "fixed") == attention_tables(ROWS, "cpu", "sharpened") == ""


def test_a_row_of_an_older_version_is_told_with_what_to_do(tmp_path: Path) -> None:
    older = {name: value for name, value in FIRST.items() if name != "chunk"}
    append(tmp_path / "ttft.jsonl", older)
    message = "ttft.jsonl has no 'chunk', which .* shows: take out rows of older versions, or measure them again"
    with pytest.raises(ValueError, match=message):
        rendered(MARKERS, tmp_path)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for item in ROWS:
        append(tmp_path / "attention.jsonl", item)
    synthetic = {"selector": "synthetic", "settings": {"density": 0.06}, "density": 0.06, "total_ms": None}
    for kernel, share in (("FLASH", 0.93), ("TRITON", 0.88)):
        fields = {**synthetic, "tflops": 571.2, "share_of_dense_tflops": share, "attend_ms": 4.1}
        append(tmp_path / "attention.jsonl", sparse(kernel, 4.1) | fields)
    cpu = {"device": "cpu", "gpu": "a CPU", "workload": "needle", "layer": 2, "timed_by": {"total_ms": "wall clock"}}
    cpu |= {"model_sha256": "0123456789abcdef"}
    append(tmp_path / "attention.jsonl", dense("sdpa", 1500.0) | cpu)
    append(tmp_path / "attention.jsonl", sparse("CPU", 900.0) | cpu | {"speedup_sdpa": 1.67})
    layer = {"layer": 0, "density": 0.3, "recall": 0.95, "lowest_recall": 0.85}
    demo = {
        "prompt": {"tokens": 16384},
        "selector": "flexprefill",
        "gamma": 0.9,
        "tau": 0.1,
        "min_budget": 512,
        "gpu": "a CPU",
    }
    demo |= {"dtype": "float32", "torch": "2.13.0", "commit": "abc", "date": "2026-11-22"}
    demo["dense"] = {"answer": "0123456", "correct": True, "prefill_seconds": 30.0}
    sparse_part = {"prefill_seconds": 20.0, "compile_seconds": 27.0, "density": 0.316, "layers": [layer]}
    demo["sparse"] = {"answer": "6", "correct": False, **sparse_part}
    append(tmp_path / "demo.jsonl", demo)
    return tmp_path


def rendered(text: str, results: Path, blocks: Iterable[str] = BLOCKS) -> str:
    page = results / "page.md"
    page.write_text(text)
    return render_document(page, blocks, results)


def test_round_trip(results: Path) -> None:
    text = f"before\n\n{MARKERS}\nafter\n"
    once = rendered(text, results)
    assert once.startswith("before\n") and once.endswith("after\n")
    assert "| dense | 0123456 right | 30.00 | - | - | - |" in once
    assert "| sparse | 6 wrong | 20.00 | 27.0 | 0.316 | 1.50x |" in once
    assert "; flexprefill, gamma 0.9, tau 0.1, min_budget 512; the prefill time" in once
    row = read(results / "demo.jsonl")[-1]
    append(results / "demo.jsonl", row | {"selector": "peakprefill", "peak": 0.2, "per_block": None, "variance": True})
    assert "; peakprefill, peak 0.2, variance True; the prefill time" in rendered(once, results)
    once = rendered(once, results)
    assert "| 65,536 | 0.060 | FLASH | 4.1 | CUDA graph | 571 | 93% |" in once
    assert "one layer, needle heads**" in once and "SHA-256 0123456789, layer 2, torch" in once and "1.67x" in once
    assert rendered(once, results) == once
    append(results / "attention.jsonl", sparse("TRITON", 6.0))
    assert rendered(once, results) != once


def test_demo_prints_a_row_that_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (LayerReport(0, 0.3, 0.95, 0.85),)
    answers = Answer("0123456", True, Measurement([1], 3.0)), Answer("0", False, Measurement([1], 1.5, 7.0, layers))
    result = DemoResult("#word", "0123456", torch.float32, *answers, False)
    monkeypatch.setattr("flexprefill_fa.tools.demo.run_demo", lambda *_, **__: result)
    printed = json.loads(CliRunner().invoke(flexprefill, ["demo", "--device", "cpu", "--json"]).stdout)
    assert printed["kind"] == "demo" and printed["commit"] == commit()
    table = demo_table([printed])
    assert "| sparse | 0 wrong | 1.50 | 7.0 | 0.300 | 2.00x |" in table
    settings = "peakprefill, peak 0.2, representatives clusters, variance True, last_full_blocks 1, block_size 128"
    assert f"torch {torch.__version__}, commit {commit()}, {printed['date']}; {settings}; the" in table


def test_without_rows_nothing_stands_between_the_markers(tmp_path: Path) -> None:
    assert rendered(MARKERS, tmp_path) == MARKERS
    filled = MARKERS.replace("<!-- /bench:density -->", "old table\n<!-- /bench:density -->")
    assert rendered(filled, tmp_path) == MARKERS


@pytest.mark.parametrize(
    ("text", "expected", "message"),
    [
        (MARKERS, ("density",), "page.md must hold the blocks density, each .* whole ones speed-summary, "),
        ("nothing\n", ("density", "demo"), "page.md must hold the blocks density, demo, .* got whole ones none"),
        (2 * "<!-- bench:demo -->\n<!-- /bench:demo -->\n", ("demo",), "got whole ones demo, demo"),
        ("<!-- bench:demo -->\n<!-- /bench:demo -->\n", (), "blocks none, .* got whole ones demo"),
        ("<!-- bench:other -->\n<!-- /bench:other -->\n", BLOCKS, "must hold the blocks speed-summary, .* ones other"),
        ("<!-- bench:density -->\n", (), "got whole ones none, and markers of density"),
        ("<!-- /bench:density -->\n", (), "each from a <!-- bench:NAME --> to its <!-- /bench:NAME --> on lines"),
        ("<!-- bench:density -->\n<!-- /bench:demo -->\n", (), "whole ones none, and markers of demo, density"),
    ],
)
def test_a_document_holds_its_blocks_whole_and_no_others(
    text: str, expected: Iterable[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(text, tmp_path, expected)


FIRST = {
    "kind": "ttft", "gpu": "NVIDIA H200", "shape": "llama-3.1-8b", "layers": 32, "dtype": "bfloat16", "ranks": 1,
    "length": 65536, "chunk": None, "compiled": False, "transformers": "5.17.0", "commit": "def456",
    "date": "2026-11-23", "settings": {"peak": 0.2, "per_block": None}, "selector": "peakprefill", "kernel": None,
    "synthetic_density": 0.05, "backend": "FLASH", "ttft_ms": 2000.0,
}  # fmt: skip
DENSE_FIRST = {"selector": None, "settings": {}, "synthetic_density": None, "backend": None}
FIRST_TOKENS = [
    FIRST | DENSE_FIRST | {"kernel": "sdpa", "ttft_ms": 4000.0},
    FIRST | DENSE_FIRST | {"kernel": "FLASH", "ttft_ms": 3000.0},
    FIRST,
    FIRST | {"backend": "TRITON", "ttft_ms": 2500.0},
    FIRST | DENSE_FIRST | {"kernel": "sdpa", "length": 4096, "ttft_ms": 120.0},
    FIRST | {"length": 4096, "ttft_ms": 150.0},
    FIRST | {"length": 131072, "ttft_ms": 1.0},  # no dense row
]


def test_the_summary_of_speeds() -> None:
    table = speed_summary(ROWS, FIRST_TOKENS)
    assert cells(table, "65,536")[1:] == ["9.0%", "54 ms", "5.5 ms", "9.82x", "3,000 ms", "2,000 ms", "1.50x"]
    assert cells(table, "4,096")[1:] == ["100.0%", "0.5 ms", "0.5 ms", "1.00x", "120 ms", "150 ms", "0.80x"]
    assert "131,072" not in table
    for part in (
        "peak 0.2",
        "commit abc123",
        "llama-3.1-8b, 32 layers, random weights",
        "density 0.05",
        "commit def456",
    ):
        assert part in table.splitlines()[0]


@pytest.mark.parametrize(
    "other",
    [
        {"compiled": True},
        {"ranks": 2},
        {"chunk": 8192},
        {"settings": {"peak": 0.1, "per_block": None}},
        {"selector": "flashprefill"},
        {"synthetic_density": None},
        {"synthetic_density": 0.2},
        {"shape": "another"},
        {"error": "0 of 32 calls", "backend": "auto"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_summary_compares_like_with_like(other: dict[str, Any]) -> None:
    faster = FIRST | {"ttft_ms": 10.0} | other
    assert speed_summary(ROWS, [*FIRST_TOKENS, faster]) == speed_summary(ROWS, FIRST_TOKENS)


def test_no_summary_without_both_measurements() -> None:
    assert speed_summary(ROWS, []) == speed_summary([], FIRST_TOKENS) == ""
    assert speed_summary(ROWS, FIRST_TOKENS[:2]) == ""
    assert "| 65,536 |" not in speed_summary(ROWS, [row for row in FIRST_TOKENS if row["length"] != 65536])


def test_broken_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "attention.jsonl"
    file.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"attention\.jsonl:3 is not JSON"):
        read(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match=r":1 must be a JSON object, got list"):
        read(file)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["render", *arguments])


def test_documents_are_what_the_rows_say() -> None:
    result = run("--check")
    assert result.exit_code == 0, result.output
    assert RESULTS.is_dir() and sum(map(len, DOCUMENTS.values())) == len(BLOCKS), "each block stands in one document"


def test_render_writes_what_check_wants(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    readme, other = results / "README.md", results / "other.md"
    readme.write_text(MARKERS)
    other.write_text("nothing to render\n")
    monkeypatch.setattr("bench.cli.DOCUMENTS", {other: (), readme: tuple(BLOCKS)})
    monkeypatch.setattr("bench.cli.RESULTS", results)
    stale = run("--check")
    assert stale.exit_code == 1 and "error: README.md is not what the rows say" in stale.stderr
    assert readme.read_text() == MARKERS
    assert run().exit_code == 0
    assert run("--check").exit_code == 0
    assert readme.read_text() != MARKERS and other.read_text() == "nothing to render\n"
    assert (results / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "fedcba-dirty")
    assert commit(tmp_path) == "fedcba-dirty"


def test_rows_are_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    for value in (1, None):
        append(path, {"value": value})
    assert path.read_text() == '{"value": 1}\n{"value": null}\n'
    assert read(path) == [json.loads(line) for line in path.read_text().splitlines()]
    assert read(tmp_path / "missing.jsonl") == []
