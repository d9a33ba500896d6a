"""A run of the needle model's recipe: what it reads, what it tells, and the model that it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needle_runs import TINY, run_in, source_drawn, weights

from bench.needle.batches import Builder
from bench.needle.corpus import Corpus
from bench.needle.train import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_settings_give_the_same_model(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    """In the folder of another run too, of which nothing is left."""
    run_in(tmp_path, corpus, replace(TINY, seed=1))
    assert weights(tmp_path) != weights(whole_run)
    told = run_in(tmp_path, corpus)
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    assert all((tmp_path / name).read_bytes() == (whole_run / name).read_bytes() for name in names)
    stages = [line for line in told if "tokens each" in line]
    assert stages == ["steps 0 to 2: 2 x 256 tokens each", "steps 2 to 4: 2 x 640 tokens each"]
    assert told[1].startswith("step 0: loss ") and ", multikey " in told[1] and told[-1].startswith("step 3: loss ")


def test_a_loss_that_is_no_number_stops_the_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(network: Any, *arguments: Any) -> dict[str, torch.Tensor]:
        outcome = take_step(network, *arguments)
        if arguments[-1] == 2:
            network.model.norm.weight.data.fill_(float("nan"))
        return outcome

    monkeypatch.setattr("bench.needle.train.take_step", spoiling)
    with pytest.raises(ValueError, match="the loss is nan at step 3"):
        run_in(tmp_path / "model", corpus)
    assert not (tmp_path / "model").exists()


def test_what_is_trained_on_is_the_corpus(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = set()

    def training(network: Any, optimizer: Any, builder: Builder, *arguments: Any) -> dict[str, torch.Tensor]:
        trained.add(source_drawn(builder))
        return take_step(network, optimizer, builder, *arguments)

    monkeypatch.setattr("bench.needle.train.take_step", training)
    run_in(tmp_path, corpus)
    assert trained and all(text in corpus.tokens.tobytes() for text in trained)
