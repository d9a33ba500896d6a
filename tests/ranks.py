"""Functions run by several ranks, each a process of its own under torchrun, and what each returned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.paths import ROOT


def run_ranks(function: Callable[[Any], Any], argument: Any, folder: Path, *, ranks: int = 2, timeout: float) -> list:
    """What a test module's function returns on each rank; `torch.save` must be able to write it.

    Args:
        function: of a module in tests/; called with the argument alone, it finds its rank in the environment.
        argument: anything with a `repr` that Python reads back.
        folder: for what the ranks write.
        ranks: processes.
        timeout: in seconds, of all together.
    """
    out = folder / f"{function.__name__}_rank"
    script = folder / f"{function.__name__}.py"
    script.write_text(
        "import os, torch\n"
        f"from {function.__module__} import {function.__name__}\n"
        f"torch.save({function.__name__}({argument!r}), {str(out)!r} + os.environ['RANK'])\n"
    )
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    done = subprocess.run(
        command,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{ranks} ranks of {function.__name__} ended with {done.returncode}:\n{done.stdout}"
    return [torch.load(f"{out}{rank}") for rank in range(ranks)]
