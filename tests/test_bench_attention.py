"""`python -m bench attention` on the CPU: a small run whole, and one line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from typer.testing import CliRunner, Result

import bench.attention
from bench.cli import app
from bench.spec import parse_lengths, parse_selector
from bench.tables import line_of
from bench.timing import Stopwatch, significant, summarise
from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.tools.loading import UsageError

SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "float32", "--device", "cpu")
FAST = ("--repeats", "2", "--seconds", "0.1")
CPU = torch.device("cpu")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["attention", *arguments])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "rows.jsonl"


def test_small_run(out: Path) -> None:
    spec = "flexprefill:min_budget=128+gamma=0.5"
    result = run("--lengths", "512", "--selectors", spec, *SMALL, *FAST, "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["path"], row["kernel"], row["backend"]) for row in rows[:2]] == [
        ("dense", "sdpa", None),
        ("dense", "CPU", None),
    ]
    for row in rows:
        assert row["kind"] == "attention" and row["device"] == "cpu" and "error" not in row
        assert (row["length"], row["heads"], row["kv_heads"], row["head_dim"]) == (512, 4, 2, 32)
        asked = {"batch": 1, "dtype": "float32", "workload": "sharpened", "seed": 0, "repeats": 2}
        assert row | asked == row
        assert row["gpu"] and row["commit"] and row["date"] and row["torch"] == torch.__version__
        assert 0 < row["total_ms_p20"] <= row["total_ms"] <= row["total_ms_p80"]
        assert set(row["timed_by"].values()) == {"wall clock"}
        assert row["check_error"] <= row["check_allowed"]
    sdpa = rows[0]["total_ms"]
    best = min(rows[0]["total_ms"], rows[1]["total_ms"])
    sparse = next(row for row in rows if row["backend"] == "CPU")
    assert (sparse["path"], sparse["kernel"], sparse["selector"]) == ("sparse", "CPU", "flexprefill")
    assert sparse["settings"] | {"gamma": 0.5, "min_budget": 128, "tau": 0.1} == sparse["settings"]
    assert 0.2 < sparse["density_min"] <= sparse["density"] <= sparse["density_max"] < 1
    assert 0.3 < sparse["recall_min"] <= sparse["recall"] < 1
    assert sparse["check_sparse_share"] == pytest.approx(1, abs=0.01)
    assert sparse["speedup_sdpa"] == pytest.approx(sdpa / sparse["total_ms"], abs=1e-3)
    assert sparse["speedup_best_dense"] == pytest.approx(best / sparse["total_ms"], abs=1e-3)
    kept = round(sparse["density"] * 10) * 4 * 4 * 128**2 * 32  # density is a mean: near enough
    assert sparse["tflops"] == pytest.approx(kept / sparse["attend_ms"] / 1e9, rel=0.2, abs=0.01)
    assert 0 < sparse["select_ms"] < sparse["total_ms"] * 3
    auto = next(row for row in rows if row["backend"] == "auto")
    assert (auto["path"], auto["kernel"]) == ("sparse", "CPU") and auto["attend_ms"] > 0
    assert "512 tokens, dense sdpa: " in result.stderr
    assert "512 tokens, flexprefill, gamma 0.5, min_budget 128 CPU: " in result.stderr


def test_synthetic_density_prints_a_table(out: Path) -> None:
    options = ("--density", "0.8", "--backends", "CPU", "--lengths", "768")
    result = run(*options, *SMALL, *FAST, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "| 768 | 0.810 | CPU |" in result.stdout and "x best dense" in result.stdout
    assert "768 tokens, density 0.8 CPU: " in result.stderr
    row = json.loads(out.read_text().splitlines()[-1])
    assert (row["selector"], row["settings"]) == ("synthetic", {"density": 0.8})
    assert row["density"] == row["density_min"] == row["density_max"] == pytest.approx(round(0.8 * 21) / 21, abs=1e-5)
    assert row["attend_ms"] > 0 and "total_ms" not in row and "select_ms" not in row
    assert row["share_of_dense_tflops"] > 0


@pytest.mark.parametrize(
    ("spoiled", "problem"),
    [
        ("dense", "relative error"),
        ("wrong", "relative error nan"),
        ("raises", "RuntimeError: no kernel image"),
    ],
)
def test_failing_check_has_no_times_and_exits_with_1(
    spoiled: str, problem: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instead(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        if spoiled == "raises":
            raise RuntimeError("no kernel image\nand more")
        right = bench.attention.causal_attention(query, key, value, "sdpa")
        return right if spoiled == "dense" else right * float("nan")

    monkeypatch.setattr(bench.attention, "sparse_prefill_attention", instead)
    options = ("--lengths", "512", "--selectors", "flexprefill:min_budget=128+gamma=0.5", "--backends", "CPU")
    result = run(*options, *SMALL, *FAST, "--out", str(out))
    assert result.exit_code == 1
    row = json.loads(out.read_text().splitlines()[-1])
    assert row["error"].startswith(problem)
    assert not [name for name in row if name.endswith("_ms") or name.startswith("speedup")]
    assert f"| error: {problem}" in result.stdout and f"WRONG: {problem}" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "4k"), "lengths must be whole numbers of tokens from 1, such as 4096,8192, got '4k'"),
        (("--lengths", "4096,,512"), "lengths must be a comma-separated list, got '4096,,512'"),
        (("--lengths", "0"), "got '0'"),
        (("--lengths", "512,512"), "lengths must name each item once, got 512 more than once"),
        (("--selectors", "nonsense"), "unknown selector 'nonsense', expected one of"),
        (("--selectors", "flexprefill:alpha=1"), "selector flexprefill has no alpha, only gamma, tau"),
        (("--selectors", "flexprefill:gamma"), "must have the form name:field=value+field=value, got 'gamma'"),
        (("--selectors", "flexprefill:gamma=0.9+gamma=0.8"), "sets gamma more than once"),
        (("--selectors", "flexprefill:gamma=2"), "gamma must be in (0, 1], got 2"),
        (("--selectors", "flexprefill:gamma=high"), "gamma must be a number, got str 'high'"),
        (("--density", "1.5"), "density must be in (0, 1], got 1.5"),
        (("--density", "much"), "density must be in (0, 1], got much"),
        (("--density", "0.1", "--lengths", "512"), "density at 512 tokens must be in [0.7, 1]"),
        (("--backends", "FLASH"), "backend='FLASH' cannot run: it needs a CUDA GPU"),
        (("--backends", "TRITON"), "backend='TRITON' cannot run on tensors on cpu"),
        (("--backends", "fast"), "backend must be one of"),
        (("--workload", "random"), "workload must be one of sharpened, fixed, needle, model, got 'random'"),
        (("--workload", "needle", "--heads", "4"), "the model has 8 heads, 2 kv-heads and head-dim 64: leave those"),
        (("--workload", "model"), "--workload model and --model FOLDER go together, got model and None"),
        (("--workload", "needle", "--layer", "6"), "layer must be in [0, 6), got 6"),
        (("--heads", "6", "--kv-heads", "4"), "heads must be a multiple of kv-heads, got 6 and 4"),
        (("--head-dim", "40"), "head-dim must be a multiple of 16, got 40"),
        (("--dtype", "int8"), "dtype must be one of"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    options: tuple[str, ...], message: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("started to measure")

    monkeypatch.setattr("bench.cli.LengthBenchmark", no_work)
    result = run("--device", "cpu", *options, "--out", str(out))
    assert_refused(result, message)
    assert result.stdout == "" and not out.exists()


def test_running_out_of_memory_is_one_line(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("bench.cli.LengthBenchmark", full)
    result = run("--lengths", "512", "--device", "cpu", "--out", str(out))
    assert result.exit_code == 2
    assert "error: 512 tokens: CUDA out of memory." in result.stderr and "Tried" not in result.stderr


def test_specs_that_parse() -> None:
    assert parse_selector("flexprefill") == FlexPrefillConfig()
    parsed = parse_selector("flexprefill:gamma=0.9+max_budget=4096+variant=paper")
    assert parsed == FlexPrefillConfig(gamma=0.9, max_budget=4096, variant="paper")
    assert parse_lengths("8192, 512") == [512, 8192]
    with pytest.raises(UsageError):
        parse_lengths("")


def test_a_tile_in_a_log() -> None:
    row = {"length": 4096, "head_dim": 64, "tile": "128x64", "attend_ms": 0.5}
    assert "head_dim 64, tile 128x64" in line_of(row)


def test_percentiles() -> None:
    times = summarise([float(x) for x in range(101)], "wall clock")
    assert (times.median, times.p20, times.p80, times.repeats) == (50, 20, 80, 101)
    assert times.fields("select_ms") == {"select_ms": 50, "select_ms_p20": 20, "select_ms_p80": 80}
    assert summarise([2.0], "wall clock").p80 == 2


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Calls that take as long as they say, on a clock of their own."""
    now = [0.0]
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: now[0])

    def make(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds

        return call

    return make


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 20), (0.5, 10), (60.0, 3)])
def test_slow_calls_are_repeated_less_often(
    seconds: float, expected: int, slept: Callable[[float], Callable[[], None]]
) -> None:
    times = Stopwatch(CPU, repeats=20, seconds=5.001).graph(slept(seconds))
    assert times.repeats == expected
    assert times.median == pytest.approx(seconds * 1e3)
    assert times.timed_by == "wall clock"


def test_auto_that_goes_dense_is_checked_and_reported_as_dense(out: Path) -> None:
    """A prompt that the selector keeps whole."""
    result = run("--lengths", "256", "--backends", "auto", *SMALL, *FAST, "--out", str(out))
    assert result.exit_code == 0, result.output
    row = json.loads(out.read_text().splitlines()[-1])
    assert (row["backend"], row["path"], row["kernel"]) == ("auto", "dense", "sdpa")
    assert "density" not in row and "check_sparse_share" not in row
    assert row["total_ms"] > 0 and not {"select_ms", "attend_ms", "tflops"} & set(row)
    assert "| auto (dense sdpa) |" in result.stdout and "flexprefill auto (dense sdpa): " in result.stderr


def test_a_slow_cpu_has_a_throughput() -> None:
    """Rows say how it compares with dense, which 0.00 would not."""
    assert [significant(1e-6), significant(123.456)] == [1e-06, 123.5]
