"""A job of `bench.serve_job` on vLLM, run as `python -m bench.serve_vllm`."""

from __future__ import annotations

import time
from typing import Any

from bench.serve_job import answer, timed_batches

_EXTENSION = "flexprefill_fa.integrations.vllm.WorkerExtension"


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """What `serve_job.run_job` says, in this process and without `log`."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    llm = LLM(**job["engine"], worker_extension_cls=_EXTENSION)
    started = time.perf_counter() - start
    if job.get("synthetic"):
        llm.collective_rpc(_attend_synthetic, args=(job["synthetic"],))
    llm.collective_rpc("sparse_prefill_statistics", args=(True,))  # without what ran at the start
    memory = _memory if job.get("memory") else None
    at_start = llm.collective_rpc(memory) if memory else None
    phases = [_run_phase(llm, phase, memory) for phase in job["phases"]]
    return {"start_seconds": started, "memory": at_start, "phases": phases}


def _run_phase(llm: Any, phase: dict[str, Any], memory: Any) -> dict[str, Any]:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    ignore_eos = phase.get("ignore_eos", False)
    sampling = SamplingParams(temperature=0.0, max_tokens=phase["max_tokens"], ignore_eos=ignore_eos, detokenize=False)

    def generate(batch: list[list[int]]) -> list[Any]:
        return llm.generate([{"prompt_token_ids": ids} for ids in batch], sampling, use_tqdm=False)

    if phase.get("fault"):
        llm.collective_rpc(_set_fault, args=(True,))
    answers, seconds = timed_batches(phase, generate)
    if phase.get("fault"):
        llm.collective_rpc(_set_fault, args=(False,))
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


def _attend_synthetic(worker: Any, density: float) -> None:
    """Let every sparse layer of a worker select in full and then attend over random blocks instead."""
    from bench.serve import synthetic_attention

    attend = synthetic_attention(density)
    for impl in sparse_layers(worker):
        impl.attend = attend


def _fail(*arguments: Any) -> Any:
    raise RuntimeError("sparse attention was made to fail")


def _set_fault(worker: Any, failing: bool) -> None:
    for impl in sparse_layers(worker):
        if failing:
            impl.attend, impl.attend_before = _fail, impl.attend
        else:
            impl.attend = impl.attend_before


if __name__ == "__main__":
    answer(run_engine)
