"""Ranks and the model they share; `test_several_ranks.py` starts some, for the weights and the command."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from bench.models import Ranks, build_model

ALONE = Ranks(0, 1, torch.device("cpu"))
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 1}


def config(heads: int = 4, kv_heads: int = 2) -> LlamaConfig:
    return LlamaConfig(**SIZES, num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=0.1)


def test_the_weights_are_the_seeds() -> None:
    given = config()
    first, same, other = (build_model(given, torch.bfloat16, ALONE, seed) for seed in (0, 0, 1))
    for name, weight in first.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, same.get_parameter(name))
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert not torch.equal(weight, other.get_parameter(name)), name
            assert abs(weight.float().std() - 0.1) < 0.01, name
    assert given.to_dict() == config().to_dict()
    assert not torch.distributed.is_initialized()


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with Ranks.start("cpu") as ranks:
        ranks.barrier()
        assert ranks == ALONE and not torch.distributed.is_initialized()


def test_a_rank_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("LOCAL_RANK", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="each rank needs a GPU of its own: expected more than 8 GPUs, got 2"):
        Ranks.start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = r"device must be 'cuda' where ranks see GPUs \(hide them: CUDA_VISIBLE_DEVICES=\), got 'cpu'"
    with pytest.raises(ValueError, match=told):
        Ranks.start("cpu")


def test_a_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.start("cuda:1").device == torch.device("cuda", 1) and current == [torch.device("cuda", 1)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"without a number under torchrun.*: expected 'cuda', got 'cuda:1'"):
        Ranks.start("cuda:1")


@pytest.mark.parametrize("ranks", [3, 4], ids=["neither", "the kv heads not"])
def test_ranks_that_do_not_divide_the_heads(ranks: int) -> None:
    expected = f"this llama config has 4 query heads and 2 kv heads: .* divides both, got {ranks}$"
    with pytest.raises(ValueError, match=expected):
        build_model(config(), torch.float32, Ranks(0, ranks, torch.device("cpu")))
