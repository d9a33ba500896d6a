"""The needle model's commands: train and evaluate, what they say, and their mistakes in one line."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from needle_runs import CPU, FILES, TINY, command, source_drawn, weights

from bench.needle.batches import Builder
from bench.needle.corpus import Corpus, encode
from bench.needle.evaluate import evaluate, measure
from bench.needle.network import attention_kernel
from bench.needle.settings import Goal, Settings
from bench.needle.train import train
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files, source_files
from flexprefill_fa.tools.rows import Row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[Settings], None]:
    """The commands at a size for the CPU; sets another."""

    def use(settings: Settings) -> None:
        for module in ("train", "evaluate"):
            monkeypatch.setattr(f"bench.needle.{module}.FULL", settings)
            monkeypatch.setattr(f"bench.needle.{module}.resolve_device", lambda name: CPU)

    use(TINY)
    return use


@pytest.fixture
def small(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a model of the small corpus."""
    monkeypatch.setattr("bench.needle.train.build_corpus", lambda: corpus)
    return tmp_path / "small"


@pytest.mark.usefixtures("tiny")
def test_the_commands_make_and_measure_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = held_out_files()[:FILES]
    trained_on = [file for file in source_files() if file not in held_out][: FILES + 40]
    monkeypatch.setattr("bench.needle.corpus.source_files", lambda: trained_on)
    result = command(train, "--out", str(tmp_path / "model"))
    assert result.exit_code == 0, result.output
    assert f"the model is in {tmp_path / 'model'}" in result.stdout

    monkeypatch.setattr("bench.needle.evaluate.held_out_files", lambda: held_out)
    shown = command(evaluate, "--model", str(tmp_path / "model"))
    assert shown.exit_code == 0, shown.output
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(row["task"], row["length"]) for row in rows] == [(task, 700) for task in EVALUATED]
    facts = {"kind": "needle", "model_sha256": model_sha256(tmp_path / "model"), "seed": 0, "torch": torch.__version__}
    assert all(row | facts == row for row in rows)
    assert "| vt | 0.000 |" in shown.stderr and "\nQuestions of each task: 2 at 700 tokens.\n" in shown.stderr
    assert f"torch {torch.__version__}, Python {platform.python_version()}, commit " in shown.stderr


def test_another_seed_is_another_run(small: Path, whole_run: Path, tiny: Any) -> None:
    assert command(train, "--out", str(small), "--seed", "3").exit_code == 0
    assert weights(small) != weights(whole_run)


@pytest.mark.usefixtures("tiny")
def test_evaluate_asks_about_text_that_is_held_out(
    corpus: Corpus, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measuring(network: Any, builder: Builder, *arguments: Any) -> Row:
        asked.append(source_drawn(builder))
        return measure(network, builder, *arguments)

    monkeypatch.setattr("bench.needle.evaluate.measure", measuring)
    result = command(evaluate, "--model", str(whole_run))
    assert result.exit_code == 0, result.output
    held_out = encode(corpus.tokenizer, [ascii_text(file) for file in held_out_files()]).tobytes()
    assert len(asked) == len(EVALUATED) and all(text in held_out for text in asked)


def test_a_model_that_misses_its_goals_is_measured_and_fails(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[Settings], None]
) -> None:
    """Of the cells, one is below the goal of its length, one at it; the other length has no goal to miss."""
    tiny(replace(TINY, goals=(Goal(700, 2, 0.5), Goal(900, 2, 0.0))))

    def measuring(network: Any, builder: Builder, task: str, length: int, samples: int, seed: int) -> Row:
        return {"task": task, "length": length, "samples": samples, "exact": 0.25 if task == "vt" else 0.5}

    monkeypatch.setattr("bench.needle.evaluate.measure", measuring)
    result = command(evaluate, "--model", str(whole_run))
    assert result.exit_code == 1, result.output
    *table, line = result.stderr.strip().splitlines()
    assert line == "error: vt at 700 tokens must reach 0.5, got 0.250; train with another --seed"
    assert "| multikey | 0.500 | 0.500 |" in table and "| vt | 0.250 | 0.250 |" in table
    assert len(result.stdout.splitlines()) == 2 * len(EVALUATED)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated"), "error: CUDA out of memory."),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    ],
    ids=["memory", "disk"],
)
def test_what_runs_out_in_a_step_is_one_line(
    error: Exception, said: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> dict[str, torch.Tensor]:
        raise error

    monkeypatch.setattr("bench.needle.train.take_step", failing)
    assert_refused(command(train, "--out", str(small)), said)


@pytest.mark.usefixtures("tiny")
def test_mistakes_are_one_line(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(command(evaluate, "--model", str(tmp_path)), f"the model folder {tmp_path} has no config.json")
    broken = tmp_path / "broken"
    shutil.copytree(MODEL_DIR, broken)
    (broken / "tokenizer.json").write_bytes(b"{")
    assert_refused(command(evaluate, "--model", str(broken)), f"cannot load the tokenizer in {broken}")
    shutil.copyfile(MODEL_DIR / "tokenizer.json", broken / "tokenizer.json")
    (broken / "model.safetensors").write_bytes(b"{")
    assert_refused(command(evaluate, "--model", str(broken)), f"cannot load the model in {broken}")
    assert_refused(command(train, "--out", "/dev/null/x"), "Not a directory")
    monkeypatch.undo()
    monkeypatch.setattr("bench.needle.train.resolve_device", lambda name: CPU)
    monkeypatch.setattr("bench.needle.corpus.source_files", lambda: ())
    assert_refused(command(train, "--out", str(small)), "the text must hold 512 different words", "got 0")


def test_a_gpu_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("bench.needle.evaluate.resolve_device", lambda name: torch.device("cuda"))
    assert_refused(command(evaluate), "needs a GPU of compute capability 8.0 or more, got 7.5")
    with attention_kernel(CPU):
        assert torch.backends.cuda.math_sdp_enabled()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    with attention_kernel(torch.device("cuda")):
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()


def test_training_wants_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        assert_refused(command(train, "--out", str(tmp_path)), "finds no CUDA GPU here")
