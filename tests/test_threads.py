"""Threads that compile, and run while others compile: each gets its own sparse output."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.fx.experimental._config as fx_config
from hf_models import prompt, tiny_model
from surroundings import CONFIG, check_call
from threads import together

from flexprefill_fa.integrations.transformers import enable_sparse_prefill

THREADS = 8


def test_cold_calls() -> None:
    paddings = [{}, {"lengths": [900, 850]}, {"starts": [5, 130], "lengths": [890, 700]}, {}]
    limits = torch._dynamo.config.recompile_limit, fx_config.use_duck_shape
    torch._dynamo.reset()
    together([lambda i=i: check_call(seed=i, **paddings[i % len(paddings)]) for i in range(THREADS)])
    assert limits == (torch._dynamo.config.recompile_limit, fx_config.use_duck_shape)


def test_cold_models() -> None:
    models = [tiny_model(("llama", "qwen2", "qwen3")[seed % 3], layers=1, seed=seed) for seed in range(THREADS)]
    ids = [prompt(1 + seed % 2, 1100 - 50 * seed, seed=seed) for seed in range(THREADS)]
    with torch.no_grad():
        dense = [model(x, use_cache=False).logits for model, x in zip(models, ids, strict=True)]
    for model in models:
        enable_sparse_prefill(model, CONFIG)
    with torch.no_grad():
        alone = [model(x, use_cache=False).logits for model, x in zip(models, ids, strict=True)]
    for one, other in zip(alone, dense, strict=True):
        assert (one - other).abs().max() > 0.1, "dense attention would pass too"

    def check(i: int) -> None:
        with torch.no_grad():
            torch.testing.assert_close(models[i](ids[i], use_cache=False).logits, alone[i], atol=1e-3, rtol=1e-3)

    torch._dynamo.reset()
    together([lambda i=i: check(i) for i in range(THREADS)])


def test_while_another_thread_compiles_what_is_not_ours() -> None:
    check_call()  # warm: nothing of ours is compiled below
    inside, go_on = threading.Event(), threading.Event()

    def slow_backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable:
        inside.set()
        assert go_on.wait(60)
        return graph.forward

    other = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=slow_backend)(torch.ones(3)))
    other.start()
    assert inside.wait(60)
    try:
        check_call(seed=1)
    finally:
        go_on.set()
        other.join()
