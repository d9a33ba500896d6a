"""A run of the needle model's recipe: what it reads, and the rows that it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needle_runs import TINY, losses, run_in, source_drawn

from bench.needle import learning
from bench.needle.batches import Builder
from bench.needle.prepare import Corpus

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_settings_give_the_same_model(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    """In the folder of another run too, of which nothing is left."""
    run_in(tmp_path, corpus, replace(TINY, seed=1))
    assert losses(tmp_path) != losses(whole_run)
    run_in(tmp_path, corpus)
    names = ("curve.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer.json")
    assert all((tmp_path / name).read_bytes() == (whole_run / name).read_bytes() for name in names)


def test_a_loss_that_is_no_number_stops_the_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(network: Any, *arguments: Any) -> dict[str, torch.Tensor]:
        outcome = learning.take_step(network, *arguments)
        if arguments[-1] == 2:
            network.model.norm.weight.data.fill_(float("nan"))
        return outcome

    monkeypatch.setattr("bench.needle.train.take_step", spoiling)
    with pytest.raises(ValueError, match="the loss is nan at step 4"):
        run_in(tmp_path, corpus)
    assert not (tmp_path / "model").exists()


def test_what_is_trained_on_is_apart_from_what_is_asked(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, asked = set(), set()

    def training(network: Any, optimizer: Any, builder: Builder, *arguments: Any) -> dict[str, torch.Tensor]:
        trained.add(source_drawn(builder))
        return learning.take_step(network, optimizer, builder, *arguments)

    def measuring(network: Any, builder: Builder, task: str, length: int, *arguments: Any) -> dict[str, Any]:
        asked.add(source_drawn(builder))
        return {"task": task, "length": length, "exact": 1, "parts": 1}

    monkeypatch.setattr("bench.needle.train.take_step", training)
    monkeypatch.setattr("bench.needle.evaluate.measure", measuring)
    run_in(tmp_path, corpus)
    assert trained and all(text in corpus.train.tobytes() for text in trained)
    assert asked and all(text in corpus.held_out.tobytes() for text in asked)


def test_a_row_of_the_curve_is_a_mean(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    run_in(tmp_path, corpus, replace(TINY, steps_per_row=2))
    single, double = losses(whole_run), losses(tmp_path)
    assert [row["step"] for row in single] == [1, 2, 3, 4] and [row["step"] for row in double] == [2, 4]
    for stage, row in enumerate(double):
        first, second = single[2 * stage : 2 * stage + 2]
        assert row.keys() == first.keys() == second.keys()
        for name in ("stage", "tokens", "learning_rate"):
            assert row[name] == second[name]
        means = row.keys() - {"step", "stage", "tokens", "learning_rate"}
        assert {"loss", "text", "norm", "multikey", "multikey_right", "vt", "vt_right"} <= means
        for name in means:
            assert row[name] == pytest.approx((first[name] + second[name]) / 2, abs=2e-5), name


def test_a_stages_last_row_is_the_shorter_one(corpus: Corpus, tmp_path: Path) -> None:
    """Of stages of 5 steps in rows of 2."""
    stages = tuple(replace(stage, steps=5) for stage in TINY.stages)
    run_in(tmp_path, corpus, replace(TINY, stages=stages, steps_per_row=2))
    assert [row["step"] for row in losses(tmp_path)] == [2, 4, 5, 6, 8, 10]
