"""A process of many threads does not run kernels that were compiled for fewer: it would write beyond their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexprefill_fa.validation import torch_version

SCRIPT = """
import torch
from flexprefill_fa import StreamingLLMConfig, sparse_prefill_attention
from flexprefill_fa.dense import causal_attention
with torch.no_grad():
    query, key, value = (torch.randn(1, heads, 1100, 64) for heads in (8, 2, 2))
    for _ in range(4):
        out = sparse_prefill_attention(query, key, value, StreamingLLMConfig(window=2048), dense="never", backend="CPU")
        torch.testing.assert_close(out, causal_attention(query, key, value), atol=1e-5, rtol=1e-5)
        [torch.randn(size) for size in range(10, 3000, 17)]
"""


@pytest.mark.skipif(torch_version() >= (2, 13), reason="this torch keeps them apart by itself")
def test_a_cache_that_processes_of_other_numbers_of_threads_share(tmp_path: Path) -> None:
    for threads in ("1", "4"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
