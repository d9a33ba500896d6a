"""Files of rows that cannot be written, which the benchmark commands refuse before they measure anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.terminal import Recorder
from flexprefill_fa.tools.rows import Row, read

COMMANDS = {
    "attention": ("bench.cli.LengthBenchmark", ("--heads", "2", "--kv-heads", "1")),
    "peers": ("bench.cli.PeerBenchmark", ("--heads", "2", "--kv-heads", "1")),
    "quality": ("bench.cli.quality_rows", ()),
    "ttft": ("bench.ttft.build_model", ("--config", "tiny")),
}


def never(*arguments: Any) -> None:
    pytest.fail("something was measured")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [".", "file/rows.jsonl"])
def test_a_file_of_rows_that_cannot_be_written(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    measures, options = COMMANDS[command]
    monkeypatch.setattr(measures, never)
    out = tmp_path / name
    result = CliRunner().invoke(app, [command, "--lengths", "2048", "--device", "cpu", *options, "--out", str(out)])
    assert result.exit_code == 2, result.output
    problem = "rows must go to a file of JSON lines" if name == "." else "cannot add rows to"
    assert problem in result.stderr.replace("\n", " ") and str(tmp_path) in result.stderr.replace("\n", "")


def test_rows_follow_those_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    """A line that was not finished is cut off; memory that runs out leaves what was measured before."""
    out = tmp_path / "rows.jsonl"
    out.write_text('{"a": 1}\n{"b": ')
    row = {"length": 600, "selector": None, "kernel": "sdpa", "total_ms": 1.5}

    def rows() -> Iterator[Row]:
        yield row
        raise torch.OutOfMemoryError("no room")

    run = Recorder(out, as_json=False)
    run.take("600 tokens", None, rows)
    run.take("700 tokens", None, lambda: [row | {"length": 700}])
    assert read(out) == [{"a": 1}, row, row | {"length": 700}] and run.incomplete
