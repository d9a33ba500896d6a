"""CPU time of a call until its work is with the GPU, ours beside SDPA's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import described, summarise
from bench.workloads import structured_inputs
from flexprefill_fa import FlexPrefillConfig, Selector, get_selector, selector_names, sparse_prefill_attention
from flexprefill_fa.dense import fastest_dense
from flexprefill_fa.dispatch import Request, kernel_for
from flexprefill_fa.graph_cache import GRAPHS
from flexprefill_fa.tools.rows import Row

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WARM_UPS = 20  # the first call compiles, the second is replayed


def host_us(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Microseconds from a call to its return, each with an idle GPU before it."""
    found = []
    for index in range(WARM_UPS + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        call()
        if index >= WARM_UPS:
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
            config: Selector = get_selector(name)()
            call = partial(sparse_prefill_attention, *inputs, config, dense="never", graph=graph)
            cases.append((name, kernel, call))
    base = None
    shape = {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    for case, backend, call in cases:
        kept = len(GRAPHS)
        found = summarise(host_us(call, device, repeats), "wall clock")
        base = found.median if base is None else base
        graph = "auto" if len(GRAPHS) > kept else "never"
        row = described("host", device, dtype, **shape, case=case, kernel=backend, graph=graph, repeats=repeats)
        yield row | found.fields("host_us") | {"more_than_sdpa_us": round(found.median - base, 1)}
