"""What `scripts/sanitize.sh` puts under the sanitizer is every Triton kernel of the package."""

from __future__ import annotations

import importlib.util
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
    assert len(expected) == 25 and launched == expected


def test_without_a_sanitizer_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "SANITIZER": str(tmp_path / "nothing")}
    run = subprocess.run([ROOT / "scripts" / "sanitize.sh"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "no compute-sanitizer" in run.stderr
