"""Files of rows that cannot be written, which the benchmark commands refuse before they measure anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cli import app

COMMANDS = {
    "attention": ("bench.cli.LengthBenchmark", ("--heads", "2", "--kv-heads", "1")),
    "peers": ("bench.peers_cli.PeerBenchmark", ("--heads", "2", "--kv-heads", "1")),
    "quality": ("bench.quality_cli.quality_rows", ()),
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
