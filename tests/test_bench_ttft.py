"""`python -m bench ttft` on the CPU: a tiny model, the selector that stands in for another, what a user gets wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from typer.testing import CliRunner, Result

import bench.ttft
from bench.cli import app
from bench.models import SHAPES, Ranks, build_model, model_config
from bench.synthetic import StandIn
from bench.ttft import kernels_of
from bench.ttft_tables import FIRST_TOKEN
from flexprefill_fa import FlashPrefillConfig, FlexPrefillConfig, select_blocks, sparse_prefill_attention
from flexprefill_fa.integrations.transformers import enable_sparse_prefill
from flexprefill_fa.tools.loading import DTYPES, UsageError
from flexprefill_fa.tools.rows import read

CPU = torch.device("cpu")
TINY = ("--config", "tiny", "--dtype", "float32", "--device", "cpu", "--repeats", "1")
ONE = ("--selectors", "flexprefill:min_budget=128", "--density", "0.5")


def never(*arguments: Any) -> None:
    pytest.fail("a model was built")


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["ttft", *options])


def test_a_stand_in_runs_its_selector_and_attends_over_the_stated_blocks() -> None:
    query, key, value = (torch.randn(1, heads, 1536, 32) for heads in (4, 2, 2))
    stand_in = StandIn(FlashPrefillConfig(), 0.5, 0, CPU)
    ran = []
    inner: Any = FlashPrefillConfig().operator()
    stand_in.inner = Spy(lambda *arguments: ran.append(1) or inner(*arguments))
    selection = select_blocks(query, key, stand_in)
    assert ran == [1] and stand_in.calls == 1 and stand_in.selecting.take_ms() > 0
    expected = round(0.5 * 78)
    assert selection.kept_blocks().tolist() == [[expected] * 4]
    assert stand_in.kept_density() == pytest.approx(expected / 78)

    with torch.no_grad():
        out = sparse_prefill_attention(query, key, value, stand_in, dense="never")
    keep = selection.to_dense().repeat_interleave(128, -1).repeat_interleave(128, -2).tril()
    scores = (query.double() @ key.double().repeat_interleave(2, 1).mT) / math.sqrt(32)
    probability = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    torch.testing.assert_close(out.double(), probability @ value.double().repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)


class Spy:
    """A selector's config with another operator."""

    name, block_size, dense_tokens = "flashprefill", 128, 256

    def __init__(self, operator: Any) -> None:
        self._operator = operator

    def operator(self) -> Any:
        return self._operator

    def settings(self) -> torch.Tensor:
        return FlashPrefillConfig().settings()


def test_a_stand_in_never_returns_the_same_memory_twice() -> None:
    """A compiled graph may write over what an operator gave it."""
    query, key = torch.randn(1, 4, 1024, 32), torch.randn(1, 2, 1024, 32)
    stand_in = StandIn(FlashPrefillConfig(), 0.6, 0, CPU)
    first = select_blocks(query, key, stand_in)
    kept = first.to_dense()
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        getattr(first, name).fill_(0)
    assert torch.equal(select_blocks(query, key, stand_in).to_dense(), kept)


def test_a_density_below_what_every_row_keeps_is_raised_to_that() -> None:
    query, key = torch.randn(1, 4, 1024, 32), torch.randn(1, 2, 1024, 32)
    assert select_blocks(query, key, StandIn(FlashPrefillConfig(), 0.05, 0, CPU)).kept_blocks().tolist() == [[15] * 4]


def test_rows_of_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "ttft.jsonl"
    result = run(*TINY, *ONE, "--lengths", "1536", "--modes", "eager", "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = read(out)
    assert [row["kernel"] or row["selector"] for row in rows] == ["sdpa", "CPU", "flexprefill"]
    sparse = rows[-1]
    assert sparse["density"] == pytest.approx(round(0.5 * 78) / 78, abs=1e-5)
    assert 0 < sparse["select_ms"] < sparse["attention_ms"] < sparse["ttft_ms"]
    assert {"ttft_ms_p20", "repeats", "commit", "transformers"} <= sparse.keys()
    assert "flexprefill, min_budget 128, CPU | 0.500" in FIRST_TOKEN.markdown(rows)


def test_a_prompt_in_chunks_selects_for_each_chunk(tmp_path: Path) -> None:
    out = tmp_path / "ttft.jsonl"
    result = run(*TINY, *ONE, "--lengths", "1792", "--chunk", "1280", "--modes", "eager", "--out", str(out))
    assert result.exit_code == 0, result.output
    (row,) = read(out)
    assert row["chunk"] == 1280 and row["selector"] == "flexprefill"
    assert row["density"] == pytest.approx(0.5, abs=0.01)


def test_compiled_chunks_name_the_kernel_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk computes no offset in its graph, the others do; on a GPU that may be two kernels."""
    probe = torch.empty(1, 1, 1, 64)
    assert kernels_of(probe, 128, offset_in_graph=True) == kernels_of(probe, 128, offset_in_graph=False) == "CPU"
    found = {False: "FLASH", True: "TRITON"}
    monkeypatch.setattr("bench.ttft.resolve_backend", lambda *_, position_in_graph: found[position_in_graph])
    assert kernels_of(probe, 128, offset_in_graph=True) == "FLASH, then TRITON"
    assert kernels_of(probe, 128, offset_in_graph=False) == "FLASH"


def test_a_selector_that_keeps_every_block_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "ttft.jsonl"
    options = ("--selectors", "flexprefill", "--dense", "sdpa", "--lengths", "1024", "--modes", "eager")
    result = run(*TINY, *options, "--out", str(out))
    assert result.exit_code == 0
    assert "1024 tokens: flexprefill keeps every block, so this is left out" in result.output
    assert [row["kernel"] for row in read(out)] == ["sdpa"]


def test_a_prompt_that_runs_dense_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.ttft.enable_sparse_prefill", lambda model, config: contextlib.nullcontext())
    monkeypatch.setattr("bench.ttft.timed_attention", lambda name, timer: contextlib.nullcontext())
    out = tmp_path / "ttft.jsonl"
    result = run(*TINY, *ONE, "--dense", "", "--lengths", "1536", "--modes", "eager", "--out", str(out))
    assert result.exit_code == 1
    (row,) = read(out)
    assert row["error"] == "0 of 1 calls of attention ran sparse" and row["ran_sparse"] is False


def test_what_runs_out_of_memory_is_told_in_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the lengths after it are measured."""
    measure = bench.ttft._ModelBenchmark.row

    def row(self: Any, one: Any) -> dict[str, Any]:
        if one.length == 1536:
            raise torch.OutOfMemoryError("no room")
        return measure(self, one)

    monkeypatch.setattr("bench.ttft._ModelBenchmark.row", row)
    out = tmp_path / "ttft.jsonl"
    result = run(*TINY, *ONE, "--dense", "", "--lengths", "1536,1664", "--modes", "eager", "--out", str(out))
    assert result.exit_code == 2, result.output
    short, whole = read(out)
    assert short["length"] == 1536 and short["error"] == "out of memory" and "ttft_ms" not in short
    assert whole["length"] == 1664 and "error" not in whole and whole["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "llama-9"), "config must be one of llama-3.1-8b, tiny, got 'llama-9'"),
        (("--density", "0"), "density must be in (0, 1], got 0"),
        (("--modes", "eager,fast"), "modes must be of eager, compiled, got 'fast'"),
        (("--dense", "TRITON"), "dense must be of sdpa, CPU, got 'TRITON'"),
        (("--chunk", "512", "--dense", "sdpa"), "dense attention of a chunk needs a mask"),
        (("--selectors", "", "--dense", ""), "there is nothing to measure"),
        (("--chunk", "256", *ONE), "there is nothing to measure: give dense kernels, or selectors that drop blocks"),
        (
            ("--chunk", "1280", "--lengths", "1380", *ONE),
            "prompts and their last chunks must be at least 128 tokens for selectors to run, got 100",
        ),
        (
            ("--lengths", "100", "--selectors", "streaming_llm:sink=1+window=1+block_size=64"),
            "prompts and their last chunks must be at least 128 tokens for selectors to run, got 100",
        ),
        (
            ("--lengths", "200", "--selectors", "flexprefill", "--dense", ""),
            "there is nothing to measure: give dense kernels, or selectors that drop blocks",
        ),
        (("--dtype", "auto"), "dtype must be bfloat16, float16 or float32, got 'auto'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.ttft.build_model", never)
    assert_refused(run(*TINY, *options, "--out", str(tmp_path / "ttft.jsonl")), message)
    assert not (tmp_path / "ttft.jsonl").exists()


def test_a_gpu_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(device: torch.device) -> Any:
        raise UsageError(f"started on {device}")

    monkeypatch.setattr(bench.ttft, "parse_place", lambda device, dtype: (torch.device(device), DTYPES[dtype]))
    monkeypatch.setattr(bench.ttft, "_kernels", lambda *arguments: [])
    monkeypatch.setattr(Ranks, "start", start)
    assert "started on cuda:1" in run("--config", "tiny", "--device", "cuda:1").output


def test_the_named_shape_is_that_of_the_model() -> None:
    from transformers import AutoModelForCausalLM

    config: Any = model_config("llama-3.1-8b")
    assert config.rope_parameters["rope_theta"] == SHAPES["llama-3.1-8b"]["rope_theta"]
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == 8_030_261_248


def test_the_model_is_sparse_through_the_integration() -> None:
    """Other blocks, other logits: nothing between the benchmark and the kernel runs dense."""
    model: Any = build_model(model_config("tiny"), torch.float32, Ranks(0, 1, CPU))
    tokens = torch.randint(3, 500, (1, 1536), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(tokens).logits
        outputs = []
        for seed in (0, 1):
            with enable_sparse_prefill(model, StandIn(FlexPrefillConfig(min_budget=128), 0.5, seed, CPU)):
                outputs.append(model(tokens).logits)
    assert not torch.allclose(outputs[0], dense, atol=1e-3)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_a_table_of_first_tokens() -> None:
    settings = dataclasses.asdict(FlexPrefillConfig())
    common: dict[str, Any] = {
        "kind": "ttft", "gpu": "X", "shape": "llama-3.1-8b", "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "dtype": "bfloat16", "ranks": 1, "length": 4096, "chunk": None, "torch": "2", "triton": "3",
        "transformers": "5", "flash_attn_4": None, "commit": "c", "date": "d", "repeats": 3, "compiled": False,
    }  # fmt: skip
    dense = {"selector": None, "settings": {}, "synthetic_density": None}
    sparse = {"kernel": None, "selector": "flexprefill", "settings": settings, "synthetic_density": 0.05}
    rows = [
        common | dense | {"kernel": "sdpa", "ttft_ms": 100.0, "attention_ms": 40.0, "peak_gib": 20},
        common | dense | {"kernel": "FLASH", "ttft_ms": 80.0, "attention_ms": 20.0},
        common | dense | {"kernel": "FLASH", "compiled": True, "ttft_ms": 60.0},
        common | sparse | {"density": 0.05, "ttft_ms": 40.0, "attention_ms": 10.0, "select_ms": 2.0, "repeats": 1},
    ]
    table = FIRST_TOKEN.markdown(rows)
    assert "| 4,096 | dense SDPA | - | 100 | 1.00x | 0.80x | 40% | - | 20.0 |" in table
    assert "| 4,096 | dense FlexAttention FLASH | - | 80 | 1.25x | 1.00x | 25% | - | - |" in table
    assert "| 4,096 | dense FlexAttention FLASH, compiled | - | 60 | - | 1.00x | - | - | - |" in table
    assert "| 4,096 | flexprefill | 0.050 | 40 (one pass) | 2.50x | 2.00x | 25% | 5% | - |" in table
    broken = FIRST_TOKEN.markdown([*rows[:-1], rows[-1] | {"error": "0 of 32 calls"}])
    assert "| 4,096 | flexprefill | 0.050 | 0 of 32 calls | - | - | - | - |" in broken, "no share of selection is left"

    two = [rows[0] | {"ranks": 2, "ttft_ms": 60.0}, rows[3] | {"ranks": 2, "ttft_ms": 25.0}]
    shared = FIRST_TOKEN.markdown([*rows[:3], *two])
    assert "| x SDPA | x best dense | x one rank |" in shared and "x one rank" not in table
    assert "| dense SDPA, 2 ranks | - | 60 | 1.00x | 1.00x | 1.67x |" in shared
    assert "| flexprefill, 2 ranks | 0.050 | 25 (one pass) | 2.40x | 2.40x | - |" in shared
