"""One vLLM engine in a process of its own: a job in, what the engine answered and how long it took out.

An engine takes most of a GPU's memory and gives it back only when its process ends; so each one has a process. The
parent calls `run_job`, which runs this file as `python -m bench.vllm_engine OUT` with the job on stdin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.paths import ROOT

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
"""Set unless the caller's environment says otherwise: the engine in this process, nothing downloaded or built."""

_EXTENSION = "flexprefill_fa.integrations.vllm.WorkerExtension"


class EngineError(RuntimeError):
    """An engine's process failed; the message holds the end of what it printed."""


def run_job(job: dict[str, Any], timeout: float = 600.0) -> dict[str, Any]:
    """Run an engine.

    Args:
        job: `engine`: arguments of `vllm.LLM`; `phases`: a list of prompts to run after each other, each phase with
            `prompts` (lists of token ids), `max_tokens`, `together` (all at once, else one at a time), `ignore_eos`
            and `fault` (make sparse attention fail, to see that nothing else does); `synthetic`: attend over seeded
            random blocks of this density, after running the selection in full (see `bench.vllm`); `memory`: measure
            it. `fault`, `synthetic` and `memory` need the engine in one process.
        timeout: of the process, in seconds.

    Returns:
        `phases`: for each, `outputs` (token ids), `cached` (prompt tokens found in the prefix cache), `seconds` (of
        each request, or of all together), `statistics` (of each worker, as `integrations.vllm.statistics`) and
        `memory` (after it); `start_seconds`; `memory` (after the start); `log`: everything that was printed. Memory is
        in bytes, of each worker: `reserved` by PyTorch, and `activations`, what vLLM counted for a step.

    Raises:
        EngineError: if the process failed or took too long.
    """
    environment = {**ENVIRONMENT, **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.vllm_engine", str(out)]
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


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """The same in this process, without `log`."""
    from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]

    start = time.perf_counter()
    llm = LLM(**job["engine"], worker_extension_cls=_EXTENSION)
    started = time.perf_counter() - start
    if job.get("synthetic"):
        from bench.vllm import attend_synthetic

        llm.collective_rpc(attend_synthetic, args=(job["synthetic"],))
    llm.collective_rpc("sparse_prefill_statistics", args=(True,))  # without what ran at the start
    memory = _memory if job.get("memory") else None
    at_start = llm.collective_rpc(memory) if memory else None
    phases = [_run_phase(llm, phase, memory) for phase in job["phases"]]
    return {"start_seconds": started, "memory": at_start, "phases": phases}


def _run_phase(llm: Any, phase: dict[str, Any], memory: Any) -> dict[str, Any]:
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=phase["max_tokens"],
        ignore_eos=phase.get("ignore_eos", False),
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in phase["prompts"]]
    batches = [prompts] if phase.get("together") else [[prompt] for prompt in prompts]
    if phase.get("fault"):
        llm.collective_rpc(_break_sparse_attention)
    answers, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        answers += llm.generate(batch, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    if phase.get("fault"):
        llm.collective_rpc(_mend_sparse_attention)
    return {
        "outputs": [list(answer.outputs[0].token_ids) for answer in answers],
        "cached": [answer.num_cached_tokens for answer in answers],
        "seconds": seconds,
        "statistics": llm.collective_rpc("sparse_prefill_statistics", args=(True,)),
        "memory": llm.collective_rpc(memory) if memory else None,
    }


def _memory(worker: Any) -> dict[str, int]:
    import torch

    return {"reserved": torch.cuda.memory_reserved(), "activations": int(worker.peak_activation_memory)}


def sparse_layers(worker: Any) -> list[Any]:
    """The attention of each layer of a worker that can run sparse."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    found = [getattr(layer, "impl", None) for layer in layers]
    return [impl for impl in found if getattr(impl, "sparse_counter", None) is not None]


def _fail(*arguments: Any) -> Any:
    raise RuntimeError("sparse attention was made to fail")


def _break_sparse_attention(worker: Any) -> None:
    for impl in sparse_layers(worker):
        impl.attend, impl.attend_before = _fail, impl.attend


def _mend_sparse_attention(worker: Any) -> None:
    for impl in sparse_layers(worker):
        impl.attend = impl.attend_before


def main() -> None:
    """Read a job from stdin and write its result to the file that the command line names."""
    result = run_engine(json.load(sys.stdin))
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
