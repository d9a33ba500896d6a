"""On a CUDA GPU with SGLang: the real engine answers needle prompts with sparse prefill.

Each engine runs in a process of its own (`bench.serve_job`), which also proves the plug-in's entry point: the package
must be installed, `pip install --no-build-isolation --no-deps -e .` is enough. It has not been run yet.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from needle_served import BLIND, SETTINGS, hidden_prompt, layers, phases, right

from bench.serve_job import EngineError, run_job
from flexprefill_fa.integrations.engine_settings import SECTION
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import NeedlePrompt, another_question, build_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"),
    pytest.mark.skipif(
        not [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "flexprefill_fa"],
        reason="the package is not installed: pip install --no-build-isolation --no-deps -e .",
    ),
]

LENGTHS = (8192, 16384)
NAMES = ("single", "again", "together", "blind")


@pytest.fixture(scope="module")
def prompts(needle_tokenizer) -> dict[str, list[NeedlePrompt]]:
    """By phase: one at a time; other questions about the same texts, from the radix cache; long and short together."""
    single = [build_prompt(needle_tokenizer, tokens, seed=tokens) for tokens in LENGTHS]
    again = [
        another_question(needle_tokenizer, prompt, next(key for key in prompt.needles if key != prompt.key))
        for prompt in single
    ]
    together = [build_prompt(needle_tokenizer, tokens, seed=7 * tokens) for tokens in (300, 3000, 9000, 12000)]
    blind = [hidden_prompt(needle_tokenizer, tokens) for tokens in LENGTHS]
    return {"single": single, "again": again, "together": together, "blind": blind}


def engine(settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of `sglang.Engine` for the needle model, in a part of the GPU."""
    arguments: dict[str, Any] = {
        "model_path": str(MODEL_DIR),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "context_length": 33280,
        "chunked_prefill_size": 8192,
        "mem_fraction_static": 0.3,
        "random_seed": 0,
        "log_level": "info",
    }
    if settings is not None:
        overrides = {"json_model_override_args": json.dumps({SECTION: settings})}
        arguments |= {"prefill_attention_backend": "flexprefill", **overrides}
    return {**arguments, **more}


def served(prompts: dict[str, list[NeedlePrompt]], *names: str, **arguments: Any) -> dict[str, Any]:
    result = run_job({"engine": engine(**arguments), "phases": phases(prompts, *names)}, engine="sglang")
    return {"log": result["log"], **dict(zip(names, result["phases"], strict=True))}


@pytest.fixture(scope="module")
def sparse(prompts) -> dict[str, Any]:
    return served(prompts, *NAMES, settings=SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_answers(sparse, prompts, needle_tokenizer, name: str) -> None:
    assert all(right(needle_tokenizer, prompts[name], sparse[name]))


def test_the_same_answers_as_sglangs_own_backend(sparse, prompts) -> None:
    dense = served(prompts, "single", "together")
    for name in ("single", "together"):
        assert dense[name]["outputs"] == sparse[name]["outputs"]
        assert dense[name]["statistics"] == [{}]


def test_what_ran_sparse(sparse) -> None:
    """Every full chunk whose end sees 8192 keys: one of 8192 tokens, two of 16384; with the prefix cached, none."""
    assert "6 of 6 layers run long prefill chunks sparse, " in sparse["log"]
    assert "sparse prefill: compiled and ran" in sparse["log"], "before the first request"
    for layer in layers(sparse["single"]):
        # The radix cache has the first token of every prompt after the first.
        assert layer["chunks"] == 3 and layer["queries"] in (24575, 24576) and layer["failures"] == 0
        assert 0 < layer["density"] < 0.9
    assert all(cached > 8000 for cached in sparse["again"]["cached"]), "the radix cache stays on"
    assert {layer["chunks"] for layer in layers(sparse["again"])} == {0}


def test_dropped_blocks_are_dropped(prompts, needle_tokenizer) -> None:
    """A selector that keeps neither the needle nor the start answers wrongly: the engine did attend sparsely."""
    blind = served(prompts, "blind", settings=BLIND)
    assert not any(right(needle_tokenizer, prompts["blind"], blind["blind"]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_same_answers(sparse, prompts) -> None:
    two = served(prompts, "single", "together", settings=SETTINGS, tp_size=2, disable_custom_all_reduce=True)
    for name in ("single", "together"):
        assert two[name]["outputs"] == sparse[name]["outputs"]
        assert all(layer["chunks"] and not layer["failures"] for layer in layers(two[name]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"peek": 1}}, "unknown setting 'peek', expected one of"),
        ({"settings": {}, "decode_attention_backend": "flexprefill"}, "is for prefill alone, got"),
        ({"settings": {}, "cuda_graph_backend_prefill": "full"}, "cannot run in a captured prefill"),
    ],
)
def test_mistakes_end_the_engine_at_its_start(prompts, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        served(prompts, "single", **arguments)
