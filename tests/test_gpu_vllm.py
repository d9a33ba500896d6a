"""On a CUDA GPU with vLLM: the real engine answers needle prompts with sparse prefill.

Each engine runs in a process of its own (`bench.serve_job`), which also proves the plug-in's entry point: the package
must be installed, `pip install --no-build-isolation --no-deps -e .` is enough.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from needle_served import BLIND, SELECTOR, SETTINGS, hidden_prompt, layers, phases, right

from bench.serve import MODEL, LoadPlan
from bench.serve_job import EngineError, run_job
from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.backends import _FLASH_INSTALLED
from flexprefill_fa.integrations.engine_settings import SECTION
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, NeedlePrompt, another_question, build_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(
        not [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "flexprefill_fa"],
        reason="the package is not installed: pip install --no-build-isolation --no-deps -e .",
    ),
]

CHUNK = 8192
LENGTHS = (8192, 16384, 32768)
TOGETHER = (300, 1500, 3000, 5000, 9000, 12000, 20000, 30000)


@pytest.fixture(scope="module")
def prompts(needle_tokenizer) -> dict[str, list[NeedlePrompt]]:
    """By phase, in the order in which an engine sees them."""
    single = [build_prompt(needle_tokenizer, tokens, seed=tokens) for tokens in LENGTHS]
    again = []
    for prompt in single:
        key = next(key for key in prompt.needles if key != prompt.key)
        again.append(another_question(needle_tokenizer, prompt, key))
    # A long chunk behind a cached prefix: most of the 16K text, then 10,000 tokens more with needles of their own.
    before = single[1]
    more = next(
        prompt
        for prompt in (build_prompt(needle_tokenizer, 10000, seed=seed) for seed in range(100, 200))
        if prompt.key not in before.needles
    )
    behind = NeedlePrompt(before.token_ids[:12288] + more.token_ids, more.key, more.answer, more.needles, [])
    together = [build_prompt(needle_tokenizer, tokens, seed=7 * tokens) for tokens in TOGETHER]
    faulty = [build_prompt(needle_tokenizer, 16384, seed=5)]
    blind = [hidden_prompt(needle_tokenizer, tokens) for tokens in LENGTHS]
    return {
        "single": single,
        "again": again,
        "behind": [behind],
        "together": together,
        "faulty": faulty,
        "blind": blind,
    }


def engine(settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the needle model, in a quarter of the GPU."""
    arguments: dict[str, Any] = {
        "model": str(MODEL_DIR),
        "dtype": "bfloat16",
        "max_model_len": 33280,
        "max_num_batched_tokens": CHUNK,
        "gpu_memory_utilization": 0.25,
        "seed": 0,
    }
    if settings is not None:
        arguments |= {"attention_backend": "CUSTOM", "additional_config": {SECTION: settings}}
    return {**arguments, **more}


NAMES = ("single", "again", "behind", "together", "faulty")


@pytest.fixture(scope="module", params=["compiled", "eager"])
def served(request, prompts) -> dict[str, Any]:
    """What an engine answered, with vLLM's default compilation and CUDA graphs, and without."""
    result = run_job(
        {
            "engine": engine(SETTINGS, enforce_eager=request.param == "eager"),
            "phases": phases(prompts, *NAMES),
        }
    )
    print({"mode": request.param, "start_seconds": result["start_seconds"]})
    return {"mode": request.param, "log": result["log"], **dict(zip(NAMES, result["phases"], strict=True))}


def test_the_log_says_what_runs(served) -> None:
    assert "6 of 6 layers run long prefill chunks sparse, " in served["log"]
    assert ", kernel TRITON, for prefill" in served["log"] or ", kernel FLASH, for prefill" in served["log"]
    if torch.cuda.get_device_capability()[0] == 9:
        assert "layers run long prefill chunks sparse, FLASH_ATTN the rest: " in served["log"]
    assert "Using FlashAttention version 3" in served["log"] or torch.cuda.get_device_capability()[0] != 9
    assert "sparse prefill: compiled and ran 3 chunks in" in served["log"], "before the first request"
    assert "sparse prefill so far:" in served["log"], "the density, while it runs"


def test_single_prompts_in_chunks(served, prompts, needle_tokenizer) -> None:
    found = served["single"]
    print({"mode": served["mode"], "seconds": found["seconds"], "layers": layers(found)})
    assert all(right(needle_tokenizer, prompts["single"], found))
    assert len(layers(found)) == 6
    for layer in layers(found):
        assert (layer["chunks"], layer["queries"], layer["failures"]) == (1 + 2 + 4, sum(LENGTHS), 0)
        assert 0.01 < layer["density"] < 0.95


def test_a_second_question_hits_the_prefix_cache(served, prompts, needle_tokenizer) -> None:
    found = served["again"]
    assert all(right(needle_tokenizer, prompts["again"], found))
    for cached, prompt in zip(found["cached"], prompts["again"], strict=True):
        assert cached > len(prompt.token_ids) - 100
    assert not any(layer["chunks"] for layer in layers(found)), "the question alone is short"


def test_a_long_chunk_behind_a_cached_prefix(served, prompts, needle_tokenizer) -> None:
    found = served["behind"]
    assert all(right(needle_tokenizer, prompts["behind"], found))
    assert found["cached"] == [12288]
    for layer in layers(found):
        assert layer["chunks"] == 1 and layer["queries"] == CHUNK and layer["density"] < 0.95


def test_eight_requests_at_once(served, prompts, needle_tokenizer) -> None:
    """Decode tokens, short prompts and long chunks in the same steps."""
    found = served["together"]
    print({"mode": served["mode"], "layers": layers(found)[:1], "seconds": found["seconds"]})
    assert all(right(needle_tokenizer, prompts["together"], found))
    for layer in layers(found):
        assert layer["chunks"] >= 4 and layer["failures"] == 0 and layer["density"] < 0.95


def test_a_failure_costs_no_request(served, prompts, needle_tokenizer) -> None:
    found = served["faulty"]
    assert all(right(needle_tokenizer, prompts["faulty"], found))
    assert all(layer["failures"] == 2 and not layer["chunks"] for layer in layers(found))
    assert "sparse prefill failed for chunks of (queries, keys) [(8192, 8192)]" in served["log"]


@pytest.fixture(scope="module")
def by_transformers(prompts) -> list[list[int]]:
    """The same prompts through Hugging Face transformers, in chunks of the same size."""
    transformers = pytest.importorskip("transformers")
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).to("cuda").eval()
    config = FlexPrefillConfig(**SELECTOR)  # pyright: ignore[reportArgumentType]
    outputs = []
    with enable_sparse_prefill(model, config, min_prompt_tokens=SETTINGS["min_prompt_tokens"]):  # pyright: ignore[reportArgumentType]
        for prompt in prompts["single"]:
            ids = torch.tensor([prompt.token_ids], device="cuda")
            out = model.generate(
                input_ids=ids,
                max_new_tokens=ANSWER_DIGITS,
                do_sample=False,
                pad_token_id=0,
                prefill_chunk_size=CHUNK,
            )
            outputs.append(out[0, len(prompt.token_ids) :].tolist())
    return outputs


def test_the_same_tokens_as_by_transformers(served, by_transformers) -> None:
    assert served["single"]["outputs"] == by_transformers


def test_a_blind_selector_gives_wrong_answers(prompts, needle_tokenizer) -> None:
    """A window of a block does not carry a number that far: right answers would mean that prefill was dense.

    Decoding sees every key, so one lucky answer is allowed.
    """
    result = run_job({"engine": engine(BLIND, enforce_eager=True), "phases": phases(prompts, "blind")})
    (found,) = result["phases"]
    print({"blind": right(needle_tokenizer, prompts["blind"], found)})
    assert sum(right(needle_tokenizer, prompts["blind"], found)) <= 1
    assert all(layer["chunks"] == 7 and layer["density"] < 0.1 for layer in layers(found))


def test_a_long_prompt_takes_no_memory_that_was_not_counted(tmp_path) -> None:
    """Two layers of Llama-3.1-8B's shape, whose keys and values of 32K tokens are 128 MiB, in four chunks.

    The memory that vLLM counted for a step holds the buffer for them, which is there from the start; so what a prompt
    adds is no more, but for what torch's allocator reserves in segments and leaves unused: 70 MiB in vLLM 0.33. New
    tensors for each chunk would add 4 + 3 + 2 + 1 times a quarter of the 128 MiB to the activations, 320 MiB.
    """
    length = 32768
    plan = LoadPlan([length], {"min_prompt_tokens": CHUNK}, 0.05, 1)
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 2}))
    # Few requests, or else vLLM counts more for the logits of all of them than a chunk could ever take.
    few = {"enforce_eager": True, "gpu_memory_utilization": 0.25, "max_num_seqs": 8}
    arguments = {**plan.engine(str(tmp_path), True), **few}
    prompt = [1000 + index % 100000 for index in range(length)]
    phase = {"prompts": [prompt], "max_tokens": 1, "ignore_eos": True}
    result = run_job({"engine": arguments, "phases": [phase], "memory": True})
    (before,), (after,) = result["memory"], result["phases"][0]["memory"]
    print({"before": before, "after": after})
    for layer in layers(result["phases"][0]):
        assert (layer["chunks"], layer["failures"]) == (4, 0)
    assert after["reserved"] - before["reserved"] <= before["activations"] + 3 * 2**25


def test_statistics_of_an_engine_in_another_process(prompts, needle_tokenizer, monkeypatch) -> None:
    """As vLLM runs it by default: what is asked of a worker must travel as a name."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    result = run_job({"engine": engine(SETTINGS, enforce_eager=True), "phases": phases(prompts, "single")})
    (found,) = result["phases"]
    assert all(right(needle_tokenizer, prompts["single"], found))
    assert len(layers(found)) == 6
    for layer in layers(found):
        assert (layer["chunks"], layer["failures"], layer["off"]) == (7, 0, False) and layer["density"] < 0.95


def test_a_cache_in_fp8_is_served_by_the_parent(prompts, needle_tokenizer) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("vLLM's FlashAttention takes an fp8 cache on Hopper")
    settings = engine(SETTINGS, enforce_eager=True, kv_cache_dtype="fp8")
    result = run_job({"engine": settings, "phases": phases(prompts, "single")})
    (found,) = result["phases"]
    assert not layers(found)
    assert result["log"].count("layers with a KV cache of fp8 are served by FLASH_ATTN alone") == 1
    print({"fp8": right(needle_tokenizer, prompts["single"], found)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gama": 0.9}, "unknown setting 'gama'"),
        ({"gamma": 2}, "gamma must be in (0, 1], got 2"),
        ({"backend": "FLASH", "block_size": 64}, "backend='FLASH' cannot run"),
    ],
)
def test_bad_settings_stop_the_engine_at_its_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError) as caught:
        run_job({"engine": engine(settings, enforce_eager=True), "phases": []})
    assert message in str(caught.value)


def test_settings_from_the_environment(prompts, needle_tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("FLEXPREFILL_FA_VLLM", json.dumps({**SETTINGS, "backend": "TRITON"}))
    arguments = {**engine(enforce_eager=True), "attention_backend": "CUSTOM"}
    result = run_job({"engine": arguments, "phases": phases(prompts, "single")})
    (found,) = result["phases"]
    assert all(right(needle_tokenizer, prompts["single"], found))
    assert "settings from the environment variable FLEXPREFILL_FA_VLLM" in result["log"]
    assert all(layer["chunks"] == 7 and layer["failures"] == 0 for layer in layers(found))


@pytest.mark.skipif(not _FLASH_INSTALLED, reason="flash-attn-4 is not installed")
def test_the_flash_kernel(prompts, needle_tokenizer) -> None:
    settings = engine({**SETTINGS, "backend": "FLASH"}, enforce_eager=True)
    result = run_job({"engine": settings, "phases": phases(prompts, "single")})
    (found,) = result["phases"]
    assert ", kernel FLASH, for prefill" in result["log"]
    assert all(right(needle_tokenizer, prompts["single"], found))
    assert all(layer["chunks"] == 7 and layer["failures"] == 0 for layer in layers(found))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_same_answers(prompts, needle_tokenizer, monkeypatch) -> None:
    names = ("single", "together")
    # Without vLLM's own all-reduce and symmetric memory: NCCL works on every pair of GPUs.
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    arguments = [engine(SETTINGS, tensor_parallel_size=size, disable_custom_all_reduce=True) for size in (1, 2)]
    one, two = (run_job({"engine": given, "phases": phases(prompts, *names)})["phases"] for given in arguments)
    assert one[0]["outputs"] == two[0]["outputs"]
    for found, name in zip(two, names, strict=True):
        assert all(right(needle_tokenizer, prompts[name], found))
        assert len(found["statistics"]) == 2
        assert all(layer["chunks"] and layer["density"] < 0.95 and not layer["failures"] for layer in layers(found))
