"""Sparse prefill of a transformers model inside another module: it is the inner one that is switched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from hf_models import prompt, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.compat import patch_model
from flexprefill_fa.integrations.transformers import (
    SparseCall,
    collect_statistics,
    compile_prefill,
    describe_sparse_prefill,
    enable_sparse_prefill,
    observe_sparse_prefill,
)
from flexprefill_fa.tools.cli import app

SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1)
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


class Parallel(nn.Module):
    """As DistributedDataParallel and DeepSpeed's engine hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        return self.module(*inputs, **arguments)


class LowRank(nn.Module):
    """As PEFT puts an adapter in a linear layer's place; it starts with an adapter that changes the output."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.base_layer(states) + self.lora_B(self.lora_A(states))


class Tuner(nn.Module):
    """As PEFT's LoraModel holds a model, and passes on what it does not know."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        torch.manual_seed(1)
        for layer in model.model.layers:
            layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)
        self.model = model

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        return self.model(*inputs, **arguments)


class Adapted(nn.Module):
    """As PeftModel holds that, with a config that is not a model's."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.config = model.config
        self.peft_config = {"default": None}

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        return self.base_model(*inputs, **arguments)


def lora(model: PreTrainedModel) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def fully_sharded(model: PreTrainedModel) -> nn.Module:
    """As FSDP holds a model, and each of its layers."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Parallel(layer)
    return Parallel(model)


WRAPPERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "data_parallel": nn.DataParallel,
    "module": Parallel,
    "adapter": Adapted,
    "adapter_in_parallel": lambda model: Parallel(Adapted(model)),
    "peft": lora,
    "fully_sharded": fully_sharded,
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
}


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(prompt(1, 400), use_cache=False).logits


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_a_wrapped_model(name: str) -> None:
    inner = tiny_model("llama")
    wrapped = WRAPPERS[name](inner).eval()
    dense = run(wrapped)
    with enable_sparse_prefill(inner, SPARSE):
        expected = run(wrapped)
    assert (expected - dense).abs().max() > 0.01
    calls: list[SparseCall] = []
    with enable_sparse_prefill(wrapped, SPARSE, statistics="density") as handle:
        assert [layer.runs for layer in describe_sparse_prefill(wrapped)] == ["sparse", "sparse"]
        with collect_statistics(wrapped) as found, observe_sparse_prefill(wrapped, calls.append):
            assert torch.equal(run(wrapped), expected)
        assert found.latest().layers == (0, 1) and [call.layer for call in calls] == [0, 1]
        if name not in ("accelerate", "fully_sharded"):
            with compile_prefill(wrapped):
                assert "forward" in vars(inner)
    assert all((layer.density < 1).any() for layer in handle.statistics.values())
    assert torch.equal(run(wrapped), dense)
    patch_model(
        wrapped, "flex_prefill", {"flex_prefill_gamma": 0.5, "flex_prefill_tau": 0, "flex_prefill_min_budget": 1}
    )
    assert torch.equal(run(wrapped), expected)
    patch_model(wrapped, "default")
    assert torch.equal(run(wrapped), dense)


def test_a_compiled_model() -> None:
    inner = tiny_model("llama", layers=1)
    with enable_sparse_prefill(inner, SPARSE):
        expected = run(inner)
    dense, wrapped = run(inner), cast(Any, torch.compile(inner))
    with enable_sparse_prefill(wrapped, SPARSE):
        assert [layer.runs for layer in describe_sparse_prefill(wrapped)] == ["sparse"]
        torch.testing.assert_close(run(wrapped), expected, **CLOSE)
        with pytest.raises(ValueError, match="this LlamaForCausalLM is compiled already"):
            compile_prefill(wrapped)
    assert (expected - dense).abs().max() > 0.01
    torch.testing.assert_close(run(wrapped), dense, **CLOSE)


class Pipeline:
    """As transformers' pipelines hold a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model


def test_what_is_no_model_gets_the_way_out() -> None:
    first, second = tiny_model("llama"), tiny_model("qwen2")
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear, which holds none"):
        enable_sparse_prefill(nn.Linear(2, 2), SPARSE)
    two = nn.ModuleDict({"draft": first, "target": second})
    message = (
        r"got ModuleDict, which holds 2: pass one of them, draft \(LlamaForCausalLM\), target \(Qwen2ForCausalLM\)"
    )
    for function in (enable_sparse_prefill, describe_sparse_prefill, collect_statistics, compile_prefill):
        with pytest.raises(TypeError, match=message):
            function(two)
    with pytest.raises(TypeError, match=r"got Pipeline; pass its \.model, a LlamaForCausalLM"):
        enable_sparse_prefill(Pipeline(first), SPARSE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"PreTrainedModel, got NoneType$"):
        enable_sparse_prefill(None, SPARSE)  # type: ignore[arg-type]
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("content", "base"),
    [
        (json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}), " (for org/base): merge"),
        (json.dumps({"peft_type": "LORA"}), ", no model: merge"),
        ("[]", ", no model: merge"),
        ("{", ", no model: merge"),
    ],
)
def test_a_folder_with_only_an_adapter_says_so_in_one_line(tmp_path: Path, content: str, base: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "prompt.txt").write_text("a prompt")
    arguments = ["generate", "--model", str(tmp_path), "--prompt-file", str(tmp_path / "prompt.txt")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"holds an adapter alone{base} it into its base model with peft" in done.stderr
