"""What `scripts/sanitize.sh` puts under the sanitizer is every Triton kernel of the package."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def kernels_in_the_source() -> set[str]:
    """module:function of everything named as a kernel."""
    found = set()
    for path in (ROOT / "flexprefill_fa").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found |= {f"{module}:{name}" for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script itself runs")
def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    spec = importlib.util.spec_from_file_location("every_kernel", ROOT / "scripts" / "every_kernel.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    launched = set()

    def recorded(self: Any, *arguments: Any, **named: Any) -> None:
        """Launches nothing: the host code of a selection reads nothing back."""
        launched.add(f"{self.fn.__module__}:{self.fn.__name__}")

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    script.launch_every_kernel(torch.device("cpu"))
    expected = kernels_in_the_source()
    assert len(expected) == 27 and launched == expected


def test_without_a_sanitizer_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "SANITIZER": str(tmp_path / "nothing")}
    run = subprocess.run([ROOT / "scripts" / "sanitize.sh"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "no compute-sanitizer" in run.stderr


PYTHON = """
[ "$2" = --parts ] && printf '0 first part\\n1 second part\\n2 third part\\n' && exit
[ "$2" = "$BROKEN" ] && exit 3
echo "every kernel was launched"
"""
SANITIZER = """
tool=$2
shift 6
"$@" || exit
found=0
[ "$tool ${@: -1}" = "$FOUND" ] && found=2
[ $tool = memcheck ] && echo "========= ERROR SUMMARY: $found errors"
[ $tool = racecheck ] && echo "========= RACECHECK SUMMARY: $found hazards displayed (0 errors, $found warnings)"
[ $found = 0 ] || exit 9
"""


@pytest.mark.parametrize(
    ("given", "found", "problems", "status"),
    [
        ({}, {"memcheck": [0, 0, 0], "racecheck": [0, 0, 0]}, 0, 0),
        ({"TOOLS": "racecheck", "PARTS": "0 2"}, {"racecheck": [0, 0]}, 0, 0),
        ({"FOUND": "memcheck 1"}, {"memcheck": [0, 2, 0], "racecheck": [0, 0, 0]}, 0, 1),
        ({"FOUND": "racecheck 2"}, {"memcheck": [0, 0, 0], "racecheck": [0, 0, 2]}, 0, 1),
        ({"BROKEN": "1"}, {"compile": [None], "memcheck": [0, None, 0], "racecheck": [0, None, 0]}, 3, 1),
    ],
)
def test_each_tool_and_part_is_a_line(
    given: dict[str, str], found: dict[str, list[int | None]], problems: int, status: int, tmp_path: Path
) -> None:
    for name, text in (("python", PYTHON), ("sanitizer", SANITIZER)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    own = {"PYTHON": str(tmp_path / "python"), "SANITIZER": str(tmp_path / "sanitizer"), "LOGS": str(tmp_path / "logs")}
    run = subprocess.run(
        [ROOT / "scripts" / "sanitize.sh"], env={**os.environ, **own, **given}, capture_output=True, text=True
    )
    assert run.returncode == status, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    by_tool: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda row: ("first part", "second part", "third part").index(row["part"])):
        by_tool.setdefault(row["tool"], []).append(row["errors"])
    assert by_tool == found and sum(row["problem"] is not None for row in rows) == problems
    assert run.stdout.endswith("sanitize: nothing found\n") == (status == 0)
