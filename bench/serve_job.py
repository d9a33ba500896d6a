"""One serving engine in a process of its own: a job in, what the engine answered and how long it took out.

An engine takes most of a GPU's memory and gives it back only when its process ends; so each one has a process. The
parent calls `run_job`, which runs an engine's own module as `python -m bench.serve_vllm OUT` with the job on stdin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import ROOT
from flexprefill_fa.tools.loading import UsageError

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
"""Set unless the caller's environment says otherwise: vLLM's engine in its process, nothing downloaded or built."""


class EngineError(UsageError):
    """An engine's process failed; the message holds the end of what it printed."""


def run_job(job: dict[str, Any], timeout: float = 600.0, engine: str = "vllm") -> dict[str, Any]:
    """Run an engine, "vllm" or "sglang", for at most `timeout` seconds.

    Args:
        job: `engine`: arguments of `vllm.LLM` or `sglang.Engine`; `phases`: a list of prompts to run after each other,
            each with `prompts` (lists of token ids), `max_tokens`, `together` (all at once, else one at a time),
            `ignore_eos` and `fault` (make sparse attention fail, to see that nothing else does); `synthetic`: attend
            over seeded random blocks of this density (see `bench.serve`); `memory`: measure it. `fault` and `memory`
            are vLLM's alone, which has to be in one process for them and for `synthetic`.

    Returns:
        `phases`: for each, `outputs` (token ids), `cached` (prompt tokens found in the prefix cache), `seconds` (of
        each request, or of all together), `statistics` (of each worker, as `statistics` of the integration) and
        `memory` (after it); `start_seconds`; `memory` (after the start); `log`: everything that was printed. Memory is
        in bytes, of each worker: `reserved` by PyTorch, and `activations`, what vLLM counted for a step.
    """
    environment = {**ENVIRONMENT, **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"bench.serve_{engine}", str(out)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(job),
                env=environment,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"the engine took more than {timeout:.0f} seconds") from error
        if done.returncode or not out.is_file():
            raise EngineError(f"the engine's process ended with {done.returncode}:\n{done.stdout[-8000:]}")
        return {**json.loads(out.read_text()), "log": done.stdout}


def timed_batches(phase: dict[str, Any], generate: Callable[[list[Any]], list[Any]]) -> tuple[list[Any], list[float]]:
    """The answers to a phase's prompts, all at once or one at a time, and the seconds of each call."""
    prompts, answers, seconds = phase["prompts"], [], []
    for batch in [prompts] if phase.get("together") else [[prompt] for prompt in prompts]:
        start = time.perf_counter()
        answers += generate(batch)
        seconds.append(time.perf_counter() - start)
    return answers, seconds


def answer(run_engine: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read a job from stdin and write its result to the file that the command line names."""
    result = run_engine(json.load(sys.stdin))
    Path(sys.argv[1]).write_text(json.dumps(result))
