"""`python -m bench host` on the CPU: a row for each case, none added to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_checks import assert_refused
from typer.testing import CliRunner

from bench.cli import app
from bench.speed_tables import HOST
from flexprefill_fa import selector_names


def run(*options: str):
    return CliRunner().invoke(app, ["host", *options])


def test_rows_of_the_cpu_are_printed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.host.HEADS", 4)
    monkeypatch.setattr("bench.host.KV_HEADS", 2)
    monkeypatch.setattr("bench.host.HEAD_DIM", 32)
    monkeypatch.setattr("bench.host.WARM_UPS", 2)
    out = tmp_path / "host.jsonl"
    result = run("--lengths", "300", "--device", "cpu", "--dtype", "float32", "--repeats", "3", "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["case"] for row in rows] == ["sdpa", "dense auto", *selector_names()]
    assert not out.exists(), "a CPU's times are no result"
    for row in rows:
        assert (row["kind"], row["device"], row["length"], row["heads"]) == ("host", "cpu", 300, 4)
        assert row["graph"] == "never", "there are no graphs on a CPU"
        assert 0 < row["host_us_p20"] <= row["host_us"] <= row["host_us_p80"]
    assert (rows[1]["kernel"], {row["kernel"] for row in rows[2:]}) == ("sdpa", {"CPU"})


def test_prefills_of_the_needle_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.host.PREFILL_WARM_UPS", 1)
    options = ("--prefill", "--lengths", "1200", "--device", "cpu", "--dtype", "float32", "--repeats", "2")
    result = run(*options, "--out", str(tmp_path / "host.jsonl"))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["case"] for row in rows] == ["sdpa", "as it comes", "peakprefill", "flashprefill"]
    for row in rows:
        assert (row["length"], row["model"], row["graph"], row["repeats"]) == (1200, "needle", "never", 6)
        assert 0 < row["prefill_ms_p20"] <= row["prefill_ms"] <= row["prefill_ms_p80"]


def test_the_table_has_a_line_for_each_case_launched_and_replayed() -> None:
    same = {"gpu": "G", "length": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "repeats": 9}
    same |= {"torch": "2.11.0", "triton": "3.6.0", "commit": "abc", "date": "2026-01-01", "selector": None}
    cases = [("cosa", "FLASH", "auto", 135.4), ("sdpa", "sdpa", "never", 57), ("cosa", "FLASH", "never", 1104.2)]
    rows = [
        {**same, "case": case, "kernel": kernel, "graph": graph, "host_us": us} for case, kernel, graph, us in cases
    ]
    table = HOST.markdown([*rows, {**same, "case": "cosa", "kernel": "FLASH", "host_us": 5.0}]).splitlines()
    assert table[2] == '| call | kernel | graph="auto", µs | graph="never", µs |'
    assert table[-2:] == ["| cosa | FlexAttention FLASH | 135 | 1,104 |", "| sdpa | SDPA | - | 57 |"]


def test_what_cannot_run_is_refused() -> None:
    assert_refused(run("--dtype", "auto"), "dtype must be bfloat16, float16 or float32, got 'auto'")
    assert_refused(run("--lengths", "4k"), "lengths must be whole numbers of tokens")
