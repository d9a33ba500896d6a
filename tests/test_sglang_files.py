"""The integration over SGLang's own files, where there are any; no GPU and no installed SGLang.

SGLANG_FILES names folders, apart by colons, each with an unpacked wheel of SGLang and the package msgspec, of which its
classes are made:

    pip download --no-deps --only-binary=:all: --dest wheels sglang==0.5.23
    unzip wheels/sglang-0.5.23-*.whl -d sglang_0.5.23
    pip install --no-deps --target sglang_0.5.23 msgspec
    SGLANG_FILES=$PWD/sglang_0.5.23 pytest tests/test_sglang_files.py -rs

In each folder the tests of `test_sglang_backend.py` and `test_sglang_choice.py` run again, in a process of their own,
with SGLang's classes in the place of the stand-ins: ForwardBatch, ForwardMode, RadixAttention, ReqToTokenPool,
MHATokenToKVPool, KVWriteLoc, AttentionBackend, the registry, the hooks and the scheduler's report. Stand-ins remain for
the `ModelRunner`, the configuration (an engine publishes it when it starts), and the parent's kernel, which is plain
attention; `test_sglang_parents.py` has SGLang's own one for the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FOLDERS = os.environ.get("SGLANG_FILES", "").split(os.pathsep)
AGAIN = ("test_sglang_backend.py", "test_sglang_choice.py", "test_sglang_parents.py")


@pytest.mark.parametrize("folder", FOLDERS, ids=os.path.basename)
def test_a_release(folder: str) -> None:
    if not folder:
        pytest.skip("SGLANG_FILES names no folder with the files of SGLang")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *AGAIN]
    environment = {
        **os.environ,
        "SGLANG_IN_PLACE": str(Path(folder).resolve()),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
