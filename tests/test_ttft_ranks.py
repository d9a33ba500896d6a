"""A model of random weights on several ranks is the model that one process builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from transformers import LlamaConfig

from bench.ttft_ranks import Ranks, build_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
}
SEEDS = (0, 1)


def logits_of_seeds(device: str) -> dict[str, Any]:
    """On one rank or on each of several."""
    with Ranks.start(device) as ranks:
        models = {seed: build_model(LlamaConfig(**SIZES), torch.float32, ranks, seed) for seed in SEEDS}
        with torch.no_grad():
            logits = {seed: model(torch.arange(50)[None]).logits for seed, model in models.items()}
        held = sum(_local(parameter).numel() for parameter in models[0].parameters())
        return {"logits": logits, "held": held, "rank": ranks.rank, "ranks": ranks.world_size}


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def test_two_ranks_hold_slices_of_what_one_process_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone = logits_of_seeds("cpu")
    assert not torch.equal(alone["logits"][0], alone["logits"][1])
    together = run_ranks(logits_of_seeds, "cpu", tmp_path, timeout=120)
    assert [rank["rank"] for rank in together] == [0, 1]
    for rank in together:
        assert rank["ranks"] == 2 and rank["held"] < 0.8 * alone["held"]
        for seed in SEEDS:
            torch.testing.assert_close(rank["logits"][seed], alone["logits"][seed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(4, 2, 3), (4, 2, 4)], ids=["neither", "the kv heads not"])
def test_ranks_that_do_not_divide_the_heads(heads: int, kv_heads: int, ranks: int) -> None:
    config = LlamaConfig(**{**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads})
    expected = f"this llama config has {heads} query heads and {kv_heads} kv heads: .* divides both, got {ranks}$"
    with pytest.raises(ValueError, match=expected):
        build_model(config, torch.float32, Ranks(0, ranks, torch.device("cpu")))
