"""Rows of `python -m bench ttft` are of what they say: of a dense kernel's attention, and of a compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import graphs
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP
from typer.testing import CliRunner

from bench.cli import app
from bench.models import Ranks, build_model, model_config
from bench.prefill_kernels import dense_prefill
from flexprefill_fa.tools.rows import read


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one item whenever a layer's feed-forward part runs outside of a graph."""
    found: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            found.append(x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernel", ["sdpa", "CPU"])
@torch.no_grad()
def test_a_dense_kernel_gives_the_logits_of_sdpa(kernel: str, compiled: bool, layers_run: list[int]) -> None:
    config: Any = model_config("tiny")
    config.initializer_range = 0.2
    model = build_model(config, torch.float32, Ranks(0, 1, torch.device("cpu")))
    tokens = torch.randint(3, 500, (1, 300), generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:  # with a cache from outside, as `generate` gives it: torch 2.13 cannot trace making one
        return model(tokens, past_key_values=DynamicCache(config=model.config)).logits

    expected = logits()
    assert layers_run == [300]
    with dense_prefill(model, kernel, compiled):
        torch.testing.assert_close(logits(), expected, atol=1e-3, rtol=1e-4)
    assert len(layers_run) == (1 if compiled else 2)
    assert model.config._attn_implementation == "sdpa" and "forward" not in vars(model)

    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    assert (logits() - expected).abs().max() > 0.1, "no attention would pass too"


@pytest.mark.parametrize(
    "options",
    [("--selectors", "", "--dense", "sdpa"), ("--selectors", "flexprefill:min_budget=128", "--dense", "")],
    ids=["dense", "sparse"],
)
def test_a_row_says_whether_the_model_was_compiled(
    options: tuple[str, ...], layers_run: list[int], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    before, found = graphs(), {}
    for mode in ("eager", "compiled"):
        layers_run.clear()
        out = tmp_path / f"{mode}.jsonl"
        plain = "--config tiny --dtype float32 --device cpu --lengths 600 --density 0.5"
        more = ("--modes", mode, "--repeats", "1", "--seconds", "1000", "--out", str(out))
        result = CliRunner().invoke(app, ["ttft", *plain.split(), *options, *more])
        assert result.exit_code == 0, result.output
        (row,) = read(out)
        assert row["compiled"] is (mode == "compiled") and row["ttft_ms"] > 0
        assert ("attention_ms" in row) is not row["compiled"]
        if row["selector"] is not None:
            assert row["select_ms"] > 0 and row["density"] == pytest.approx(9 / 15)  # what every row keeps
        found[mode] = (graphs() - before, len(layers_run))
        before = graphs()
    sparse = "flexprefill" in options[1]
    assert found == {"eager": (1 if sparse else 0, 3), "compiled": (1, 0)}  # sparse attention itself is a graph
