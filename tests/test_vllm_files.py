"""The integration over the Python files of vLLM's releases, where there are any; no GPU and no installed vLLM.

VLLM_FILES names folders, apart by colons, each with the unpacked `*.py` and `*.dist-info` of one wheel:

    pip download --no-deps --only-binary=:all: --dest wheels vllm==0.33.0
    unzip wheels/vllm-0.33.0-*.whl '*.py' '*/METADATA' -d vllm_0.33.0
    VLLM_FILES=$PWD/vllm_0.33.0 pytest tests/test_vllm_files.py -rs
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FOLDERS = os.environ.get("VLLM_FILES", "").split(os.pathsep)


@pytest.mark.parametrize("folder", FOLDERS, ids=os.path.basename)
def test_a_release(folder: str) -> None:
    """See `vllm_files_checks.py`, whose process imports that release's modules."""
    if not folder:
        pytest.skip("VLLM_FILES names no folder with the files of a release of vLLM")
    command = [sys.executable, str(TESTS / "vllm_files_checks.py"), folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("shown for vLLM ")
