"""The benchmark of serving engines on the CPU: its synthetic blocks, its plan, and the documents' table."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from oracle import causal_oracle, relative_error
from typer.testing import CliRunner

from bench.cli import app
from bench.serve import LoadPlan, synthetic_attention
from bench.serve_job import EngineError
from bench.serve_tables import ENGINES, serve_tables
from bench.synthetic import chunk_selection
from flexprefill_fa import StreamingLLMConfig
from flexprefill_fa.block_mask import check_layout
from flexprefill_fa.grid import unmasked_blocks, visible_blocks
from flexprefill_fa.integrations.engine_settings import SECTION, Settings
from flexprefill_fa.selection import every_block
from flexprefill_fa.tools.needle.prompts import another_question, build_prompt, is_correct
from flexprefill_fa.tools.rows import read

SHAPES = [(129, 129), (1000, 1000), (4096, 4096), (1024, 4096), (1000, 4001), (129, 700)]


@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_blocks_of_a_chunk(q_len: int, kv_len: int, density: float) -> None:
    found = chunk_selection(q_len, kv_len, 4, density, seed=3)
    check_layout(found)
    visible = visible_blocks(found.grid, found.ranges)[:, None]
    full = unmasked_blocks(found.grid, found.ranges)[:, None]
    keep = found.to_dense()
    assert not (keep & ~visible).any() and keep[..., 0].all()
    assert (keep | ~visible | full).all(), "what the causal boundary crosses is kept"
    least = ((visible & ~full).sum() + (visible & full)[..., 0].sum()) / visible.sum()
    expected, half_a_block = max(density, least.item()), 0.51 / visible.sum().item()
    assert found.density().flatten().tolist() == pytest.approx([expected] * 4, abs=half_a_block)
    assert torch.equal(found.kept_blocks(), keep.sum((-2, -1))), "none in both lists"
    listed = torch.arange(found.full_kv_indices.shape[-1]) < found.full_kv_num_blocks[..., None]
    assert (found.full_kv_indices.diff(dim=-1)[listed[..., 1:]] > 0).all(), "ascending, none twice"
    assert torch.equal(keep, chunk_selection(q_len, kv_len, 4, density, seed=3).to_dense())
    if q_len == 4096 and density == 0.5:
        assert not torch.equal(keep[0, 0], keep[0, 1])
    if density == 1.0:
        query, key = torch.empty(1, 4, q_len, 16), torch.empty(1, 4, kv_len, 16)
        assert torch.equal(keep, every_block(query, key, 128).to_dense())


def test_synthetic_attention_selects_and_then_attends_over_its_own_blocks(monkeypatch) -> None:
    import bench.serve

    selected = []
    monkeypatch.setattr(bench.serve, "select_blocks", lambda *arguments, **options: selected.append(options["scale"]))
    query, key, value = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    attend = synthetic_attention(0.4)
    chosen = Settings(selector=StreamingLLMConfig())
    out, blocks = attend(query, key, value, chosen, 32**-0.5)
    again = attend(query, key, value, chosen, 32**-0.5)[1]
    assert again is blocks and selected == [32**-0.5] * 2
    expected, _, real = causal_oracle(query, key, value, blocks)
    assert relative_error(out, expected, real) < 1e-5


def test_no_setting_reaches_the_synthetic_blocks() -> None:
    with pytest.raises(ValueError, match="unknown setting 'synthetic'"):
        LoadPlan([4096], {"synthetic": 0.05}, 0.05, 3)


def test_the_plan() -> None:
    plan = LoadPlan([4096, 65536], {"gamma": 0.9}, 0.05, 6)
    short, long, together, first, second = plan.phases()
    assert [len(phase["prompts"]) for phase in (short, long)] == [7, 3], "the first of each is not counted"
    assert {len(prompt) for prompt in long["prompts"]} == {65536} and long["max_tokens"] == 1
    assert short["prompts"][0] != short["prompts"][1], "no prefix to reuse"
    assert together["together"] and first["max_tokens"] == second["max_tokens"] == 128
    default, sparse = plan.engine("folder", False), plan.engine("folder", True)
    assert {**default, "attention_backend": "CUSTOM", "additional_config": {SECTION: {"gamma": 0.9}}} == sparse


def test_the_plan_for_sglang() -> None:
    """Prompts and sizes are those of vLLM's plan; only where they and the settings are said differs."""
    plan = LoadPlan([4096, 65536], {"gamma": 0.9}, 0.05, 6, "sglang")
    default, sparse = plan.engine("folder", False), plan.engine("folder", True)
    overrides = '{"sparse_prefill": {"gamma": 0.9}}'
    assert {**default, "prefill_attention_backend": "flexprefill", "json_model_override_args": overrides} == sparse
    assert (default["context_length"], default["chunked_prefill_size"]) == (65552, 8192)
    assert plan.phases() == LoadPlan([4096, 65536], {"gamma": 0.9}, 0.05, 6).phases()


class Engine:
    """SGLang's as far as a job goes: it counts a chunk of 8 causal blocks, 2 of them kept, for each prompt."""

    run_scheduler_process_func = None
    down = 0

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.chunks, self.sampling = arguments, 3, []

    def generate(self, input_ids: list[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        self.sampling.append(sampling_params)
        self.chunks += len(input_ids)
        return [{"output_ids": [sum(ids)], "meta_info": {"cached_tokens": 0}} for ids in input_ids]

    def get_server_info(self) -> dict[str, Any]:
        counts = {"chunks": self.chunks, "kept_blocks": 2 * self.chunks, "causal_blocks": 8 * self.chunks}
        more = {"density": 0.25, "failures": 0, "off": False}
        return {"internal_states": [{"sparse_prefill": {"layers.0.attn": {**counts, **more}}}]}

    def shutdown(self) -> None:
        type(self).down += 1


def test_a_job_on_sglang(monkeypatch) -> None:
    """Over a stand-in for its engine: what a phase answers, and that counts are those of the phase."""
    import bench.serve
    import bench.serve_sglang

    for name in ("sglang", "sglang.srt", "sglang.srt.entrypoints", "sglang.srt.entrypoints.engine"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["sglang.srt.entrypoints.engine"], "Engine", Engine, raising=False)
    monkeypatch.setattr(Engine, "down", 0)
    phase = {"prompts": [[1, 2], [3, 4]], "max_tokens": 5, "ignore_eos": True}
    job = {"engine": {"model_path": "folder"}, "phases": [phase, {**phase, "together": True}]}
    found = bench.serve_sglang.run_engine(job)
    alone, together = found["phases"]
    assert alone["outputs"] == together["outputs"] == [[3], [7]]
    assert (len(alone["seconds"]), len(together["seconds"])) == (2, 1)
    for counted in (alone, together):
        assert bench.serve._density(counted) == {"density": 0.25, "chunks": 2, "failures": 0}
    assert Engine.down == 1

    monkeypatch.delenv("FLEXPREFILL_FA_BENCH_DENSITY", raising=False)
    started = []
    monkeypatch.setattr(Engine, "__init__", lambda self, **arguments: started.append(self))
    bench.serve_sglang.run_engine({**job, "synthetic": 0.05, "phases": []})
    assert started[0].run_scheduler_process_func is bench.serve_sglang.run_synthetic_scheduler
    assert os.environ["FLEXPREFILL_FA_BENCH_DENSITY"] == "0.05"


def test_the_scheduler_of_a_synthetic_job(monkeypatch) -> None:
    import bench.serve_sglang
    from flexprefill_fa.integrations.engine_layer import SparseLayer

    for name in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.managers.scheduler"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    seen = []
    run = lambda *arguments: seen.append((arguments, SparseLayer().attend))  # noqa: E731
    monkeypatch.setattr(sys.modules["sglang.srt.managers.scheduler"], "run_scheduler_process", run, raising=False)
    monkeypatch.setattr(SparseLayer, "attend", SparseLayer.attend)
    monkeypatch.setenv("FLEXPREFILL_FA_BENCH_DENSITY", "0.4")
    bench.serve_sglang.run_synthetic_scheduler("server_args", 0)
    ((arguments, attend),) = seen
    assert arguments == ("server_args", 0)
    query, key, value = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    chosen = Settings(selector=StreamingLLMConfig())
    blocks = attend(query, key, value, chosen, 32**-0.5)[1]
    assert torch.equal(blocks.to_dense(), chunk_selection(300, 700, 4, 0.4).to_dense())


def row(backend: str, **fields: Any) -> dict[str, Any]:
    conditions = {
        "kind": "vllm",
        "gpu": "NVIDIA H200",
        "vllm": "0.24.0",
        "torch": "2.11.0",
        "commit": "abc",
        "date": "2026-11-22",
        "model": "Llama-3.1-8B shape, random weights",
        "layers": 32,
        "dtype": "bfloat16",
        "max_num_batched_tokens": 8192,
        "backend": backend,
        "density": None,
        "dense_kernel": "FlashAttention 3",
    }
    if backend == "sparse prefill":
        conditions |= {"settings": {}, "synthetic_density": 0.05}
    return {**conditions, **fields}


def test_the_gather_comes_after_both_engines(monkeypatch) -> None:
    import bench.serve

    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr("bench.timing.environment", lambda device: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(bench.serve, "run_job", lambda job, engine: jobs.append(job) or {"log": ""})
    monkeypatch.setattr(bench.serve, "_measured", lambda plan, result: iter([{"measure": "decode"}]))
    monkeypatch.setattr(bench.serve, "gather_share", lambda plan: {"q_len": 8192, "gather_ms": 0.5})
    *_, last = found = list(bench.serve.load_rows(LoadPlan([4096, 131072], {}, 0.05, 7), lambda line: None))
    assert [row["backend"] for row in found] == ["default", "sparse prefill", "gather"]
    assert [job.get("synthetic") for job in jobs] == [None, 0.05]
    assert (last["measure"], last["length"], last["gather_ms"]) == ("gather", 131072, 0.5)


def test_rows_of_an_engine_whose_sparse_attention_failed_are_refused() -> None:
    import bench.serve

    sound = {"chunks": 4, "queries": 32768, "density": 0.05, "failures": 0}
    found = bench.serve._density({"statistics": [{"0": sound, "1": {**sound, "density": 0.07}}]})
    assert found == {"density": 0.06, "chunks": 4, "failures": 0}
    broken = {"chunks": 0, "queries": 0, "density": None, "failures": 4}
    for layers in ({"0": sound, "1": broken}, {"0": broken, "1": broken}):
        with pytest.raises(bench.serve.EngineError, match=r"sparse attention failed for \d chunks of 2 layers"):
            bench.serve._density({"statistics": [layers]})


def test_the_table() -> None:
    rows = [
        row("default", measure="first token", length=131072, ttft_ms=12000.0, repeats=2),
        row("default", measure="decode", length=512, requests=32, tokens_per_s=2000.0),
        row("sparse prefill", measure="first token", length=131072, ttft_ms=9000.0, density=0.05, repeats=2),
        row("sparse prefill", measure="first token", length=131072, ttft_ms=4000.0, density=0.052, repeats=7),
        row("sparse prefill", measure="decode", length=512, requests=32, tokens_per_s=1990.0),
        row("gather", measure="gather", length=131072, q_len=8192, gather_ms=0.4, select_ms=0.8, attend_ms=0.8),
    ]
    text = serve_tables(rows)
    assert "| 131,072 tokens: first token, ms | 0.052 | 12,000 | 4,000 | 3.00x |" in text, "the later row counts"
    assert "| 32 requests decoding: tokens/s | - | 2,000 | 1,990 | 0.99x |" in text
    assert "random blocks of density 0.05" in text and "default backend FlashAttention 3" in text
    assert "repeats 2 to 7, commit abc" in text
    assert "from the paged cache: length 131072, q_len 8192, gather_ms 0.4, select_ms 0.8, attend_ms 0.8." in text
    assert serve_tables([]) == ""


def test_each_engine_has_a_table() -> None:
    """Beside each other in one document; rows say which engine they are of, and what it calls the tokens of a step."""
    both = []
    for kind, (title, option) in ENGINES.items():
        for backend, ttft in (("default", 600.0), ("sparse prefill", 200.0)):
            first = row(backend, measure="first token", length=65536, ttft_ms=ttft, repeats=3)
            tokens, kernel = first.pop("max_num_batched_tokens"), "fa3" if kind == "sglang" else "FlashAttention 3"
            both.append({**first, "kind": kind, option: tokens, kind: "1.2.3", "dense_kernel": kernel})
        found = serve_tables(both).split("**Llama-3.1-8B")[-1]
        assert f"{option} 8192, default backend {both[-1]['dense_kernel']}, " in found
        assert f"{title} 1.2.3" in found and f"| {title}'s default backend |" in found
    assert serve_tables(both).count("| 65,536 tokens: first token, ms | 600 | 200 | 3.00x |") == 2


def test_an_engine_that_fails_is_told_whole_behind_the_rows_before_it(monkeypatch, tmp_path) -> None:
    def rows(plan: LoadPlan, note: Any) -> Any:
        for backend in ("default", "sparse prefill"):
            yield row(backend, measure="first token", length=4096, ttft_ms=600.0, repeats=3)
        raise EngineError("the engine's process ended with 1:\nout of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.cli.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("bench.cli.load_rows", rows)
    out = tmp_path / "vllm.jsonl"
    result = CliRunner().invoke(app, ["serve", "--lengths", "4096", "--out", str(out)])
    assert result.exit_code == 2 and len(read(out)) == 2
    assert "error: vLLM: the engine's process ended with 1:\nout of memory\n" in result.stderr
    assert "4096 tokens, default, first token: 600.000 ms" in result.stderr
    assert "| 4,096 tokens: first token, ms | 600 | 600 | 1.00x |" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "gamma"], "settings must be a JSON object"),
        (["--settings", "[1]"], "settings must be a JSON object"),
        (["--settings", '{"gama": 1}'], "unknown setting 'gama'"),
        (["--density", "2"], "density must be in (0, 1], got 2"),
        (["--engine", "vlm"], "engine must be one of vllm, sglang, got 'vlm'"),
        (["--engine", "sglang"], "SGLang is measured on a CUDA GPU, and there is none"),
        ([], "vLLM is measured on a CUDA GPU, and there is none"),
    ],
)
def test_mistakes_in_one_line(arguments: list[str], message: str) -> None:
    if torch.cuda.is_available() and "there is none" in message:
        pytest.skip("there is a GPU")
    assert_refused(CliRunner().invoke(app, ["serve", *arguments]), message)


def test_another_question_about_the_same_text(needle_tokenizer) -> None:
    first = build_prompt(needle_tokenizer, 2000, seed=1)
    key = next(key for key in first.needles if key != first.key)
    second = another_question(needle_tokenizer, first, key)
    shared = next(
        index for index, pair in enumerate(zip(first.token_ids, second.token_ids, strict=False)) if len(set(pair)) > 1
    )
    assert shared > 1950 and second.answer == first.needles[key] and is_correct(second.answer, second.answer)
    assert needle_tokenizer.decode(second.token_ids).endswith(f"the special magic number for {key} is ")
    with pytest.raises(ValueError, match="key must be one of"):
        another_question(needle_tokenizer, first, "#none")
