"""CPU time of a call until its work is with the GPU, ours beside SDPA's; and prefills of a model that waits for it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import described, summarise
from bench.workloads import structured_inputs
from flexprefill_fa import FlexPrefillConfig, get_selector, selector_names, sparse_prefill_attention
from flexprefill_fa.dense import fastest_dense
from flexprefill_fa.dispatch import Request, kernel_for
from flexprefill_fa.graph_cache import GRAPHS, release_graphs
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.loading import load_model
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WARM_UPS = 20  # the first call compiles, the second is replayed
PREFILL_WARM_UPS = 5
ROUNDS = 3  # of prefills in turns: a CPU's speed drifts


def call_us(
    call: Callable[[], object], device: torch.device, warm_ups: int, repeats: int, *, whole: bool
) -> list[float]:
    """Microseconds from a call to its return, or to the end of its work (`whole`), each with an idle GPU before it."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    found = []
    for index in range(warm_ups + repeats):
        wait()
        start = time.perf_counter_ns()
        call()
        if whole:
            wait()
        if index >= warm_ups:
            found.append((time.perf_counter_ns() - start) / 1000)
    return found


@torch.no_grad()
def host_rows(device: torch.device, dtype: torch.dtype, repeats: int, length: int) -> Iterator[Row]:
    """SDPA, dense attention through `dense="auto"`, every selector, launched and replayed: one row each, in µs.

    Medians and percentiles. A row whose `graph` is "auto" is a replay of the CUDA graph that the option keeps.
    """
    inputs = structured_inputs(length, HEADS, KV_HEADS, HEAD_DIM, sharpness=1.0, dtype=dtype, device=device)
    sdpa = partial(F.scaled_dot_product_attention, *inputs, is_causal=True, enable_gqa=True)
    short = FlexPrefillConfig(min_budget=length)  # keeps every block of a prompt of this length
    cases: list[tuple[str, str, partial[Tensor]]] = [
        ("sdpa", "sdpa", sdpa),
        ("dense auto", fastest_dense(inputs.query), partial(sparse_prefill_attention, *inputs, short)),
    ]
    kernel, _ = kernel_for(inputs.query, inputs.key, 128, Request())
    for graph in ("never", "auto") if device.type == "cuda" else ("never",):
        for name in selector_names():
            call = partial(sparse_prefill_attention, *inputs, get_selector(name)(), dense="never", graph=graph)
            cases.append((name, kernel, call))
    shape = {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    for case, backend, call in cases:
        kept = len(GRAPHS)
        found = summarise(call_us(call, device, WARM_UPS, repeats, whole=False), "wall clock")
        graph = "auto" if len(GRAPHS) > kept else "never"
        row = described("host", device, dtype, **shape, case=case, kernel=backend, graph=graph, repeats=repeats)
        yield row | found.fields("host_us")


@torch.no_grad()
def prefill_rows(device: torch.device, dtype: torch.dtype, repeats: int, length: int) -> Iterator[Row]:
    """Whole uncompiled prefills of the needle model, so small that it waits for the CPU: one row each, in ms."""
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    model, _ = load_model(MODEL_DIR, dtype, device)
    model.set_attn_implementation("sdpa")
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device=device)
    configs = {"as it comes": (), **{name: (get_selector(name)(),) for name in ("peakprefill", "flashprefill")}}
    cases: dict[tuple[str, str], Callable[[], Any]] = {("sdpa", "never"): nullcontext}
    for graph in ("never", "auto") if device.type == "cuda" else ("never",):
        for name, given in configs.items():
            if not given or length > given[0].dense_tokens:
                cases[name, graph] = partial(enable_sparse_prefill, model, *given, graph=graph)
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for (case, graph), made in list(cases.items()) * ROUNDS:  # in turns
        if (case, graph) not in cases:  # it went without the graph that was asked for, see below
            continue
        release_graphs()
        with made():
            call = partial(model, tokens, logits_to_keep=1)
            times[case, graph] += [us / 1000 for us in call_us(call, device, PREFILL_WARM_UPS, repeats, whole=True)]
        if (len(GRAPHS) > 0) != (graph == "auto"):  # dense, or captures that failed
            del cases[case, graph], times[case, graph]
    release_graphs()
    same = {"length": length, "model": "needle", "model_sha256": model_sha256(MODEL_DIR), "repeats": ROUNDS * repeats}
    for (case, graph), found in times.items():
        row = described("host", device, dtype, **same, case=case, graph=graph)
        yield row | summarise(found, "wall clock").fields("prefill_ms")
