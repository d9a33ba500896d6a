"""`python -m bench quality`: its yardstick against direct computations, and a small run whole."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from torch import Tensor
from typer.testing import CliRunner, Result

import bench.quality
from bench.capture import needle_layers
from bench.cli import app
from bench.quality import exact_attention, measure, sweep
from bench.spec import parse_selectors
from bench.workloads import Inputs
from flexprefill_fa import FlexPrefillConfig, get_selector, select_blocks, selector_names
from flexprefill_fa.selection import every_block
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.loading import load_config
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import read

CPU = torch.device("cpu")
SPEC = "flexprefill:min_budget=128+gamma=0.5"


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """fp64 output [B, Hq, n, D] over kept blocks, and the share of the exact probability in them [B, Hq], directly."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    keys, values = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query.double() @ keys.mT / math.sqrt(query.shape[-1])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    kept = keep.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :length, :length] & causal
    exact = scores.masked_fill(~causal, -math.inf).softmax(-1)
    return scores.masked_fill(~kept, -math.inf).softmax(-1) @ values, (exact * kept).sum(-1).mean(-1)


def tensors(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(1, heads, length, dim) * 2
    key, value = torch.randn(2, 1, kv_heads, length, dim)
    return query, key, value + torch.arange(kv_heads)[:, None, None]  # heads of different norms


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("length", [1, 127, 129, 700])
@pytest.mark.parametrize("score_bytes", [1, 2**28])
def test_exact_attention(length: int, score_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step and in many, at lengths that no block divides."""
    monkeypatch.setattr("bench.quality._SCORE_BYTES", score_bytes)
    query, key, value = tensors(length)
    exact = exact_attention(query, key, value)
    expected, _ = attention(query, key, value, every_block(query, key, 64).to_dense(), 64)
    assert exact.out.dtype == torch.float32
    torch.testing.assert_close(exact.out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact.mass.sum((-2, -1)), torch.full((1, 4), float(length)))
    for block in (64, 128):
        selection = select_blocks(query, key, FlexPrefillConfig(gamma=0.3, min_budget=64, block_size=block))
        torch.testing.assert_close(exact.recall(selection).float(), selection.recall(query, key))
        if length == 700:
            assert exact.recall(selection).max() < 0.95, "nothing was dropped"


def test_head_errors_keep_heads_apart() -> None:
    query, key, value = tensors(300)
    exact = exact_attention(query, key, value)
    spoiled = exact.out.clone()
    spoiled[:, 1] *= 1.5
    spoiled[:, 2, 0] = 0
    one_row = (exact.out[0, 2, 0].norm() / exact.out[0, 2].norm()).item()
    assert exact.head_errors(spoiled)[0].tolist() == pytest.approx([0, 0.5, one_row, 0], abs=1e-6)
    assert exact.head_errors(exact.out.flip(1)).min() > 0.1


def test_layers_are_captured_in_one_pass() -> None:
    both = needle_layers(300, [0, 2], dtype=torch.float32, device=CPU)
    assert sorted(both) == [0, 2] and both[0][0].shape == (1, 8, 300, 64) and both[2][1].shape == (1, 2, 300, 64)
    for got, expected in zip(both[2], needle_layers(300, [2], dtype=torch.float32, device=CPU)[2], strict=True):
        assert torch.equal(got, expected)
    assert not torch.allclose(both[0][0], both[2][0])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quality", "--device", "cpu", "--dtype", "float32", *arguments])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "quality.jsonl"


def test_small_run(out: Path) -> None:
    """Every number of the row against a direct computation in fp64; FlexAttention's own kernel runs."""
    options = ("--lengths", "900", "--selectors", SPEC, "--no-mean-correction")
    result = run(*options, "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    layers = load_config(MODEL_DIR).num_hidden_layers
    assert read(out) == rows and [row["layer"] for row in rows] == list(range(layers)), "all of the needle model"
    row = rows[1]
    shape = {"length": 900, "batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    what = {"kind": "quality", "workload": "needle", "layer": 1, "seed": 0, "device": "cpu", "backend": "CPU"}
    config = FlexPrefillConfig(gamma=0.5, min_budget=128)
    said = {"selector": "flexprefill", "settings": dataclasses.asdict(config), "mean_correction": False}
    assert row | shape | what | said == row and row["model_sha256"] == model_sha256(MODEL_DIR)
    assert row["gpu"] and row["commit"] and row["date"] and row["torch"] == torch.__version__

    query, key, value = needle_layers(900, [1], dtype=torch.float32, device=CPU)[1]
    keep = select_blocks(query, key, config).to_dense()
    dense, _ = attention(query, key, value, every_block(query, key, 128).to_dense(), 128)
    sparse, recall = attention(query, key, value, keep, 128)
    errors = ((sparse - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1))[0].tolist()
    density = (keep.sum((-2, -1))[0] / 36).tolist()  # 8 x 9 / 2 causal blocks
    for field, expected in (("error", errors), ("recall", recall[0].tolist()), ("density", density)):
        assert row[f"head_{field}"] == pytest.approx(expected, rel=1e-3)
        assert row[field] == pytest.approx(sum(expected) / 8, rel=1e-3)
    assert min(errors) > 0.01 and len({round(error, 3) for error in errors}) > 4, "heads that cannot be told apart"
    assert row["error_max"] == pytest.approx(max(errors), rel=1e-3)
    assert row["recall_min"] == pytest.approx(min(recall[0].tolist()), rel=1e-3)
    assert (row["density_min"], row["density_max"]) == pytest.approx((min(density), max(density)), rel=1e-3)
    assert 0 < row["dense_error"] < 1e-5
    assert "900 tokens, layer 1, flexprefill, gamma 0.5, min_budget 128 CPU: density " in result.stderr


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """Random inputs, and plain PyTorch over the selected blocks, changed, for the library's call.

    Returns:
        The options of each call, as they come.
    """
    calls: list[dict[str, Any]] = []

    def captured(length: int, layers: Sequence[int], **_: Any) -> dict[int, Inputs]:
        return {layer: Inputs(*tensors(length, heads=8)) for layer in layers}

    def instead(query: Tensor, key: Tensor, value: Tensor, config: Any, **options: Any) -> Any:
        calls.append(options)
        selection = select_blocks(query, key, config)
        sparse, _ = attention(query, key, value, selection.to_dense(), config.block_size)
        return change(sparse.to(query.dtype)), selection

    monkeypatch.setattr(bench.quality, "needle_layers", captured)
    monkeypatch.setattr(bench.quality, "sparse_prefill_attention", instead)
    return calls


def test_both_corrections_are_asked_for_unless_one_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spoil(monkeypatch, lambda sparse: sparse)
    shared = {"dense": "never", "backend": "CPU", "return_selection": True}
    options = ("--lengths", "600", "--selectors", SPEC, "--out", str(out))
    assert run(*options).exit_code == 0
    assert calls == [shared, {**shared, "mean_correction": True}] * 6
    both = [(layer, correction) for layer in range(6) for correction in (False, True)]
    assert [(row["layer"], row["mean_correction"]) for row in read(out)] == both
    calls.clear()
    result = run(*options, "--mean-correction")
    assert result.exit_code == 0 and calls == [{**shared, "mean_correction": True}] * 6
    assert "| 600 | flexprefill, gamma 0.5, min_budget 128 |" in result.stdout
    assert "flexprefill, gamma 0.5, min_budget 128, mean correction CPU: density " in result.stderr


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda sparse: sparse.flip(1), "relative error"),
        (lambda sparse: sparse * float("nan"), "relative error nan"),
    ],
)
def test_wrong_output_has_no_row(
    change: Callable[[Tensor], Tensor], problem: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, change)
    options = ("--lengths", "600", "--no-mean-correction", "--selectors", SPEC)
    result = run(*options, "--out", str(out))
    assert result.exit_code == 1 and not out.exists()
    assert "failed: 600 tokens, layer 0, FlexPrefillConfig(gamma=0.5" in result.stderr and problem in result.stderr


def test_dense_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(*tensors(600))
    exact = exact_attention(inputs.query, inputs.key, inputs.value)
    config = FlexPrefillConfig(gamma=0.3, min_budget=128)
    spoil(monkeypatch, lambda sparse: sparse)
    assert measure(inputs, exact, config, "CPU", False)["error"] > 0.05
    spoil(monkeypatch, lambda _: exact.out)
    with pytest.raises(ArithmeticError, match="relative error"):
        measure(inputs, exact, config, "CPU", False)
    spoil(monkeypatch, lambda sparse: sparse * float("inf"))
    with pytest.raises(ArithmeticError, match="the output is not finite"):
        measure(inputs, exact, config, "CPU", True)


def test_a_setting_that_raises_leaves_the_others(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spoil(monkeypatch, lambda sparse: sparse)
    whole = bench.quality.sparse_prefill_attention

    def without_argument(*arguments: Any, **options: Any) -> Any:
        if "mean_correction" in options:
            raise TypeError("unexpected keyword argument 'mean_correction'\nand more")
        return whole(*arguments, **options)

    monkeypatch.setattr(bench.quality, "sparse_prefill_attention", without_argument)
    result = run("--lengths", "600", "--selectors", SPEC, "--out", str(out))
    assert result.exit_code == 1 and len(calls) == len(read(out)) == 6
    assert "mean_correction=True: TypeError: unexpected keyword argument 'mean_correction'\n" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--selectors", "streaming_llm:gamma=0.5"), "selector streaming_llm has no gamma"),
        (("--dtype", "auto"), "dtype must be bfloat16, float16 or float32, got 'auto'"),
        (("--lengths", "20"), "tokens must be at least"),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], message: str, out: Path) -> None:
    result = run(*options, "--out", str(out))
    assert_refused(result, message)
    assert result.stdout == "" and not out.exists()


def test_the_default_sweep() -> None:
    configs = parse_selectors("selectors", sweep())
    assert len(set(configs)) == len(configs)
    for name in selector_names():
        assert sum(config.name == name for config in configs) >= 6
    assert all(isinstance(config, get_selector(config.name)) for config in configs)
    flex = {(c.variant, c.tau, c.gamma, c.min_budget) for c in configs if isinstance(c, FlexPrefillConfig)}
    assert {
        ("published", 0.1, 0.95, 512),
        ("published", 0, 0.5, 512),
        ("paper", 0.1, 0.98, 512),
        ("published", 0.1, 0.3, 128),
    } < flex
