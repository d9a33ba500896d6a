"""SGLang's own backend for the CPU as the parent, over its own files alone: see `test_sglang_files.py`."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from paged import MIXED, SMALL
from sglang_engine import FOLDER, Step, configuration, install, make_runner, ours, sglang, sglang_in_place
from sglang_stubs import GETTERS

from bench.serve import MODEL

pytestmark = pytest.mark.skipif(not FOLDER, reason="run by test_sglang_files.py, over SGLang's own files")


@pytest.fixture(autouse=True)
def engine_modules() -> Iterator[None]:
    with sglang_in_place():
        yield


def engine(**settings: Any) -> tuple[Any, Any]:
    sglang("layers.attention.torch_native_backend")
    runner, config = make_runner(), configuration(**{**SMALL, **settings})
    config.execution.kernel.attention_backend = "torch_native"
    install(config)
    return runner, ours("sglang").create(runner)


def test_the_classes_are_sglangs() -> None:
    runner, backend = engine()
    step = Step(runner, [(1, 9)])
    for thing in (backend, step.batch, runner.token_to_kv_pool, runner.req_to_token_pool, runner.model.attention(0)):
        kind = type(thing) if type(thing).__module__.startswith("sglang.") else type(thing).__mro__[1]
        assert inspect.getfile(kind).startswith(FOLDER), kind


@pytest.mark.parametrize(("window", "density"), [(1024, 1.0), (128, None)])
def test_a_step_of_the_native_backend(window: int, density: float | None) -> None:
    """Its dense attention for the rest of a step, and the same as ours at full selection."""
    runner, backend = engine(sink=128 if density else 0, window=window)
    step = Step(runner, MIXED)
    out = step.run(backend)
    assert backend.sparse_prefill.step is not None
    for request, pair in enumerate(MIXED):
        difference = float((out[step.rows_of(request)].double() - step.dense(request)).abs().max())
        assert (difference < 2e-2) == (bool(density) or pair not in [(260, 700), (300, 300)]), (pair, difference)
    counted = ours("sglang").statistics()["layers.0.attn"]
    assert counted["chunks"] == 2 and counted["failures"] == 0
    assert counted["density"] == density or (density is None and counted["density"] < 0.95)


def test_a_short_step_is_its_own() -> None:
    runner, backend = engine()
    step = Step(runner, [(1, 90), (40, 300)])
    out = step.run(backend)
    for request in range(2):
        assert float((out[step.rows_of(request)].double() - step.dense(request)).abs().max()) < 2e-2
    assert ours("sglang").statistics()["layers.0.attn"]["chunks"] == 0


def test_the_command_line_and_the_configuration(tmp_path) -> None:
    """SGLang's own parser takes the options of the documents, and what it publishes is where the backend reads it."""
    ours("sglang").register()
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    arguments = sglang("server_args").ServerArgs
    parser = argparse.ArgumentParser()
    arguments.add_cli_args(parser)
    settings = json.dumps({"sparse_prefill": {"peak": 0.2}})
    command = ["--model-path", str(tmp_path), "--skip-tokenizer-init", "--load-format", "dummy", "--device", "cpu"]
    command += ["--chunked-prefill-size", "8192", "--prefill-attention-backend", "flexprefill"]
    given = parser.parse_args([*command, "--json-model-override-args", settings])
    context = sglang("runtime_context")
    context.publish(arguments.from_cli_args(given), role="scheduler")
    assert context.attention_backends() == ("flexprefill", "torch_native")
    engine = ours("sglang_engine")
    for name in GETTERS:
        setattr(engine, name, getattr(context, name))
    assert engine.parent_name() == "torch_native"
    runner = make_runner()
    assert engine.refusal(runner) is None and engine.dense_reason(runner) is None
    found = engine.engine_settings_of(runner)
    assert found.selector.peak == 0.2 and found.min_prefill_tokens == 512 and engine.chunk_of(runner) == 1024
