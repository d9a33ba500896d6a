"""A job of `bench.serve_job` on SGLang, run as `python -m bench.serve_sglang`.

SGLang's scheduler, which runs the model, is a process of its own; so what the benchmark puts in the place of attention
is put there by the function that this process is started with.
"""

from __future__ import annotations

import os
import time
from typing import Any

from bench.serve_job import answer, timed_batches

_DENSITY = "FLEXPREFILL_FA_BENCH_DENSITY"  # how that function is told; no setting of the backend


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """What `serve_job.run_job` says, in this process and without `log`; no `fault` and no `memory`."""
    from sglang.srt.entrypoints.engine import Engine  # pyright: ignore[reportMissingImports]

    kind: Any = Engine
    if job.get("synthetic"):
        os.environ[_DENSITY] = str(job["synthetic"])
        members = {"run_scheduler_process_func": staticmethod(run_synthetic_scheduler)}
        kind = type("SyntheticEngine", (Engine,), members)
    start = time.perf_counter()
    engine = kind(**job["engine"])
    started = time.perf_counter() - start
    try:
        phases = [_run_phase(engine, phase) for phase in job["phases"]]
    finally:
        engine.shutdown()
    return {"start_seconds": started, "memory": None, "phases": phases}


def run_synthetic_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, whose sparse layers select in full and then attend over random blocks instead."""
    from sglang.srt.managers.scheduler import run_scheduler_process  # pyright: ignore[reportMissingImports]

    from bench.serve import synthetic_attention
    from flexprefill_fa.integrations.engine_layer import SparseLayer

    SparseLayer.attend = staticmethod(synthetic_attention(float(os.environ[_DENSITY])))
    run_scheduler_process(*args, **kwargs)


def _run_phase(engine: Any, phase: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": phase["max_tokens"]}
    sampling["ignore_eos"] = phase.get("ignore_eos", False)
    before = statistics_of(engine)
    answers, seconds = timed_batches(phase, lambda batch: engine.generate(input_ids=batch, sampling_params=sampling))
    return {
        "outputs": [list(answer["output_ids"]) for answer in answers],
        "cached": [answer["meta_info"]["cached_tokens"] for answer in answers],
        "seconds": seconds,
        "statistics": [_since(before, statistics_of(engine))],
        "memory": None,
    }


def statistics_of(engine: Any) -> dict[str, dict[str, Any]]:
    """Of each sparse layer, from the start of the engine; empty with SGLang's own backend."""
    return engine.get_server_info()["internal_states"][0].get("sparse_prefill", {})


def _since(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The counts between two answers, and the density of what was counted."""
    found = {}
    for name, counts in after.items():
        earlier = before.get(name, {})
        new = {key: counts[key] - earlier.get(key, 0) for key in counts if key not in ("density", "off")}
        new["density"] = new["kept_blocks"] / new["causal_blocks"] if new["causal_blocks"] else None
        found[name] = {**new, "off": counts["off"]}
    return found


if __name__ == "__main__":
    answer(run_engine)
