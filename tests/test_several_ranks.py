"""Two ranks over gloo, started by torchrun, do what one process does; sparse, each for its own heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hf_models import prompt, tiny_model
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    AXK2Config,
    AXK2ForCausalLM,
    DistributedConfig,
    LagunaConfig,
    LagunaForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)
from typer.testing import CliRunner

from bench.cli import app
from bench.models import Ranks, build_model
from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.integrations.hf_attention import flexprefill_attention
from flexprefill_fa.integrations.hf_plan import check_model
from flexprefill_fa.integrations.transformers import (
    SparseCall,
    collect_statistics,
    describe_sparse_prefill,
    enable_sparse_prefill,
    observe_sparse_prefill,
)
from flexprefill_fa.tools.rows import read

SPARSE = FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=1)
EVERYTHING = FlexPrefillConfig(gamma=1.0, min_budget=1)
LENGTH, PADDING = 420, 128
ROWS = "ttft.jsonl"
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


@torch.no_grad()
def prefills(model: PreTrainedModel) -> dict[str, Any]:
    """What a model makes of a left-padded batch, with all its heads or a rank's."""
    ids, mask = prompt(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    found: dict[str, Any] = {"dense": model(ids, attention_mask=mask).logits[mask.bool()]}
    with enable_sparse_prefill(model, EVERYTHING):
        found["everything"] = model(ids, attention_mask=mask).logits[mask.bool()]
    with enable_sparse_prefill(model, SPARSE):
        found["runs"] = [layer.runs for layer in describe_sparse_prefill(model)]
        calls: list[SparseCall] = []
        with observe_sparse_prefill(model, calls.append):
            found["sparse"] = model(ids, attention_mask=mask).logits[mask.bool()]
        found["shapes"] = [(type(call.query).__name__, [*call.query.shape], [*call.key.shape]) for call in calls]
        found["kept"] = [call.selection.to_dense() for call in calls]
        for chunk in (None, 256):
            options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            calls.clear()
            with collect_statistics(model) as statistics, observe_sparse_prefill(model, calls.append):
                out = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)  # type: ignore[operator]
            found[f"tokens, chunks of {chunk}"] = out[:, LENGTH:].tolist()
            found[f"kept, chunks of {chunk}"] = [call.selection.to_dense() for call in calls]
            found[f"density, chunks of {chunk}"] = statistics.latest().density
    return found


def sinks_of_a_rank(rank: int, ranks: int) -> Tensor:
    """Attention with sinks `[B, n, heads, D]` for a rank's share of four query heads over two kv heads."""
    torch.manual_seed(0)
    query, key, value, sinks = torch.randn(1, 4, 200, 32), *torch.randn(2, 1, 2, 200, 32), torch.randn(4)
    if ranks > 1:
        query, key, value = (x.chunk(ranks, 1)[rank].contiguous() for x in (query, key, value))
        sinks = distribute_tensor(sinks, init_device_mesh("cpu", (ranks,)), [Shard(0)], src_data_rank=None)
    return flexprefill_attention(torch.nn.Module(), query, key, value, None, s_aux=sinks)[0]


def logits_of_random_weights(ranks: Ranks) -> Tensor:
    model = build_model(LlamaConfig(**SIZES), torch.float32, ranks, seed=1)
    with torch.no_grad():
        return model(torch.arange(50)[None]).logits


def shared(folder: Path, **options: Any) -> Any:
    """A model of which this rank has its share."""
    plan = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, **options)


def command_on_a_rank(folder: Path) -> tuple[int, str]:
    """`python -m bench ttft`, dense: `prefills` has sparse attention. The ranks stay together: they join once."""
    shape = ("--config", "tiny", "--dtype", "float32", "--device", "cpu", "--lengths", "600")
    what = ("--selectors", "", "--dense", "sdpa", "--modes", "eager", "--repeats", "1")
    with patch("torch.distributed.destroy_process_group"):
        result = CliRunner().invoke(app, ["ttft", *shape, *what, "--out", str(folder / ROWS)])
    return result.exit_code, result.output


def on_a_rank(folder: str) -> dict[str, Any]:
    """Everything that ranks do, in one start of them: they take long to import."""
    command = command_on_a_rank(Path(folder))
    with Ranks(torch.distributed.get_rank(), 2, torch.device("cpu")) as ranks:
        found = prefills(shared(Path(folder) / "2 kv heads"))
        found["sinks"] = sinks_of_a_rank(ranks.rank, ranks.world_size)
        found["random weights"] = logits_of_random_weights(ranks)
        with pytest.raises(ValueError) as error:
            enable_sparse_prefill(shared(Path(folder) / "1 kv head"))
        with pytest.raises(ValueError) as by_name:
            shared(Path(folder) / "1 kv head", attn_implementation="flexprefill")(prompt(1, LENGTH))
        ranks.barrier()
        size = torch.distributed.get_world_size()
    return found | {"errors": [str(error.value), str(by_name.value)], "ranks": (ranks.rank, size), "command": command}


def check_selections(kept: list[Tensor], expected: list[Tensor], heads: slice) -> None:
    """A rank's selections `[B, heads, nq, nk]`, one for each layer, are those that one process makes."""
    assert len(kept) == len(expected) == 2  # of two chunks the first is short, so dense
    for ours, whole in zip(kept, expected, strict=True):
        assert torch.equal(ours, whole[:, heads])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the models, and of the rows that the ranks write."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model("llama").save_pretrained(folder / "2 kv heads")
    tiny_model("llama", num_key_value_heads=1).save_pretrained(folder / "1 kv head")
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(on_a_rank, str(folder), folder=folder, timeout=240)


def test_two_ranks_do_what_one_process_does(folder: Path, both: list[dict[str, Any]]) -> None:
    alone = prefills(AutoModelForCausalLM.from_pretrained(folder / "2 kv heads"))
    assert (alone["sparse"] - alone["dense"]).abs().max() > 0.01, "dense would pass too"
    for rank, found in enumerate(both):
        assert found["ranks"] == (rank, 2)
        heads = slice(2 * rank, 2 * rank + 2)
        assert found["runs"] == ["sparse", "sparse"]
        assert found["shapes"] == [("Tensor", [2, 2, LENGTH, 32], [2, 1, LENGTH, 32])] * 2
        torch.testing.assert_close(found["everything"], alone["dense"], **CLOSE)
        torch.testing.assert_close(found["sparse"], alone["sparse"], **CLOSE)
        check_selections(found["kept"], alone["kept"], heads)
        for chunk in (None, 256):
            assert found[f"tokens, chunks of {chunk}"] == alone[f"tokens, chunks of {chunk}"]
            check_selections(found[f"kept, chunks of {chunk}"], alone[f"kept, chunks of {chunk}"], heads)
            density = found[f"density, chunks of {chunk}"]
            assert torch.equal(density, alone[f"density, chunks of {chunk}"][:, :, heads])
            assert (density.mean((1, 2)) < 0.9).all(), "dense"
        torch.testing.assert_close(found["sinks"], sinks_of_a_rank(0, 1)[:, :, heads])
        expected = logits_of_random_weights(Ranks(0, 1, torch.device("cpu")))
        torch.testing.assert_close(found["random weights"], expected, atol=1e-5, rtol=1e-5)
        assert found["errors"] == [
            f"{what} has 4 query heads and 1 kv heads: tensor parallelism needs a number of ranks that divides both, "
            "got 2"
            for what in ("layer 0 (LlamaAttention)", "this llama model")
        ]


def test_the_command_under_torchrun(folder: Path, both: list[dict[str, Any]]) -> None:
    (code, output), (other_code, other_output) = (found["command"] for found in both)
    assert code == other_code == 0, (output, other_output)
    assert "| 600 | dense SDPA, 2 ranks |" in output and "600" not in other_output
    (row,) = read(folder / ROWS)
    assert row["kernel"] == "sdpa" and row["ranks"] == 2 and row["ttft_ms"] > 0


def shared_out(ranks: int, plan: dict[str, str] | None = None) -> Any:
    """A whole model that says what transformers leaves on a rank's: how many they are and, unless its own, the plan."""
    model: Any = tiny_model("llama")
    model._tp_size = ranks
    if plan is not None:
        model._tp_plan = {f"model.layers.*.self_attn.{name}": style for name, style in plan.items()}
    return model


@pytest.mark.parametrize("ranks", [3, 4], ids=["neither", "the kv heads not"])
@pytest.mark.parametrize("function", [enable_sparse_prefill, describe_sparse_prefill])
def test_a_number_of_ranks_that_does_not_divide_the_heads(function: Callable[[Any], Any], ranks: int) -> None:
    model = shared_out(ranks)
    message = (
        r"layer 0 \(LlamaAttention\) has 4 query heads and 2 kv heads: tensor parallelism needs a number of ranks that "
        f"divides both, got {ranks}$"
    )
    with pytest.raises(ValueError, match=message):
        function(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_plan_that_shares_out_the_query_heads_alone() -> None:
    model = shared_out(2, {"q_proj": "colwise", "k_proj": "colwise_gather_output"})
    message = r"layer 0 .* alike, .*, got a tp_plan that shares out q_proj alone$"
    with pytest.raises(ValueError, match=message):
        enable_sparse_prefill(model)


def test_ranks_that_all_have_every_head() -> None:
    model = shared_out(3, {f"{name}_proj": "colwise_gather_output" for name in "qkv"})
    with enable_sparse_prefill(model):
        assert [layer.runs for layer in describe_sparse_prefill(model)] == ["sparse", "sparse"]


def test_query_heads_from_a_projection_of_another_name() -> None:
    """q_gate_proj and kv_b_proj; the projections of the indexer, which chooses keys, have no heads of the layer."""
    with torch.device("meta"):
        model: Any = AXK2ForCausalLM(
            AXK2Config(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=128)
        )
    model._tp_size = 2
    assert list(check_model(model)) == [0]
    model._tp_size = 3
    with pytest.raises(ValueError, match=r"layer 0 \(AXK2Attention\) has 4 query heads and 4 kv heads: .*, got 3$"):
        check_model(model)


def test_layers_that_differ_in_their_query_heads() -> None:
    with torch.device("meta"):
        model: Any = LagunaForCausalLM(
            LagunaConfig(
                num_hidden_layers=2, num_attention_heads=6, num_attention_heads_per_layer=[8, 6], num_key_value_heads=2
            )
        )
    model._tp_size = 2
    assert list(check_model(model)) == [0, 1]
    model._tp_size = 4
    with pytest.raises(ValueError, match=r"layer 0 .* has 8 query heads and 2 kv heads: .*, got 4$"):
        check_model(model)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"tp_size": 2}, False),
        ({"tp_plan": {}}, False),
        ({"enable_expert_parallel": True}, False),
    ],
    ids=["its own plan", "ranks that divide the heads", "a plan of the caller's", "experts alone"],
)
def test_a_model_that_chose_its_attention_by_name(changes: dict[str, Any], refused: bool) -> None:
    """Refused before its own code fails; here it is whole, and would run."""
    model: Any = tiny_model("llama", attn_implementation="flexprefill")
    given = {"tp_size": 4, "tp_plan": "auto", "enable_expert_parallel": False}
    model.config.distributed_config = SimpleNamespace(**(given | changes))
    if refused:
        with pytest.raises(ValueError, match=r"^this llama model has 4 query heads and 2 kv heads: .*, got 4$"):
            model(prompt(1, 8))
    else:
        model(prompt(1, 8))
