"""Functions of test modules run by several ranks, each a process of its own under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import ROOT


def run_ranks(function: Callable[..., Any], *arguments: Any, folder: Path, gpus: bool = False, timeout: float) -> list:
    """What a function returns on each of two ranks.

    Args:
        function: of a module in tests/; it returns what `torch.save` can write.
        arguments: for it; their `repr` is Python.
        folder: for the files of the ranks.
        gpus: whether the ranks see the GPUs.
        timeout: in seconds, of everything.
    """
    script = folder / "rank.py"
    script.write_text(
        "import os, torch\n"
        f"from {function.__module__} import {function.__name__}\n"
        f"result = {function.__name__}(*{arguments!r})\n"
        f"torch.save(result, {str(folder)!r} + '/rank' + os.environ['RANK'])\n"
    )
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    start = ("--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")  # whatever this host's name resolves to
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *start, str(script)],
        env={"OMP_NUM_THREADS": "1", **os.environ, **hidden, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks, which killing it would leave behind
        output, _ = process.communicate()
        raise AssertionError(f"the ranks of {function.__name__} took more than {timeout} s:\n{output}") from None
    assert process.returncode == 0, f"the ranks of {function.__name__} ended with {process.returncode}:\n{output}"
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]
