"""On two CUDA GPUs: the needle model spread by a device map, or shared out under torchrun, answers as on one GPU."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, NeedlePrompt, build_prompt, is_correct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
transformers = pytest.importorskip("transformers")

CONFIG = FlexPrefillConfig(gamma=0.95, min_budget=512)
TOKENS, LAYERS, HEADS = 16384, 6, 8


def load(**options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16, **options)


@torch.no_grad()
def answer(model: Any, token_ids: list[int], *, compiled: bool = False) -> dict[str, Any]:
    """The answer's tokens, and of every layer: kept blocks `[B, H]`, density and the GPU that they were counted on.

    `seconds` are those of a second prefill, from start to the first token.
    """
    from flexprefill_fa.integrations.transformers import compile_prefill, enable_sparse_prefill

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([token_ids], device=device)

    def generate(tokens: int) -> Any:
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return out[0, len(token_ids) :].tolist()

    with (
        enable_sparse_prefill(model, CONFIG, statistics="density") as handle,
        compile_prefill(model) if compiled else nullcontext(),
    ):
        tokens = generate(ANSWER_DIGITS)
        start = time.perf_counter()
        generate(1)
        seconds = time.perf_counter() - start
    layers = handle.statistics.values()
    return {
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "kept": torch.stack([layer.kept_blocks.cpu() for layer in layers]),
        "density": torch.stack([layer.density.cpu() for layer in layers]),
        "devices": [str(layer.density.device) for layer in layers],
    }


@pytest.fixture(scope="module")
def needle(needle_tokenizer) -> NeedlePrompt:
    return build_prompt(needle_tokenizer, TOKENS, seed=3)


@pytest.fixture(scope="module")
def alone(needle, needle_tokenizer) -> dict[str, Any]:
    """On one GPU."""
    found = answer(load().to("cuda:0").eval(), needle.token_ids)
    assert is_correct(needle_tokenizer.decode(found["tokens"]), needle.answer)
    print({"one GPU": found["seconds"], "density": found["density"].mean().item()})
    return found


def check(found: dict[str, Any], alone: dict[str, Any], heads: slice = slice(None)) -> None:
    """The same answer over nearly the same blocks, fewer than all of them in every layer."""
    assert found["tokens"] == alone["tokens"]
    kept, expected = found["kept"], alone["kept"][..., heads]
    assert kept.shape == expected.shape and len(kept) == LAYERS
    # bf16 sums round differently where they are cut differently, so later layers see slightly other inputs: some blocks
    # more or less, and a head near tau may take the other pattern.
    assert (kept - expected).abs().sum() <= 0.05 * expected.sum()
    assert (found["density"].mean((1, 2)) < 0.95).all(), "dense"


HALVES = {
    **dict.fromkeys(("model.embed_tokens", "lm_head", "model.rotary_emb"), 0),
    **{f"model.layers.{layer}": int(layer >= LAYERS // 2) for layer in range(LAYERS)},
    "model.norm": 1,
}


@pytest.mark.parametrize("device_map", ["auto", HALVES], ids=["auto", "halves"])
def test_a_model_spread_over_two_gpus(needle, alone, device_map: Any) -> None:
    from flexprefill_fa.integrations.transformers import compile_prefill, enable_sparse_prefill

    pytest.importorskip("accelerate")
    model = load(device_map=device_map).eval()
    found = answer(model, needle.token_ids)
    print({"device_map": device_map if device_map == "auto" else "halves", "seconds": found["seconds"]})
    assert set(found["devices"]) == {"cuda:0", "cuda:1"}, model.hf_device_map
    check(found, alone)
    with (
        enable_sparse_prefill(model, CONFIG),
        pytest.raises(ValueError, match=r"spread by device_map over cuda:0, cuda:1$"),
    ):
        compile_prefill(model)


def answers_of_a_rank(token_ids: list[int]) -> dict[bool, dict[str, Any]]:
    """Under torchrun, whose ranks transformers itself brings together."""
    import torch.distributed as dist

    model = load(distributed_config=transformers.DistributedConfig(tp_plan="auto")).eval()
    found = {compiled: answer(model, token_ids, compiled=compiled) for compiled in (False, True)}
    dist.destroy_process_group()
    return found


def test_a_model_shared_by_two_ranks(needle, alone, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    both = run_ranks(answers_of_a_rank, needle.token_ids, folder=tmp_path, gpus=True, timeout=240)
    for rank, found in enumerate(both):
        heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        for compiled, answered in found.items():
            print({"rank": rank, "compiled": compiled, "seconds": answered["seconds"]})
            assert set(answered["devices"]) == {f"cuda:{rank}"}
            check(answered, alone, heads)
