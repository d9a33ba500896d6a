"""The needle model's commands: prepare, train and evaluate, what they say, and their mistakes in one line."""

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
from needle_runs import CPU, FILES, TINY, command, losses, refused, source_drawn

from bench.needle.batches import Builder
from bench.needle.evaluate import evaluate, measure
from bench.needle.network import attention_kernel
from bench.needle.prepare import Corpus, encode, prepare
from bench.needle.settings import Goal, Settings
from bench.needle.train import train
from flexprefill_fa.tools.loading import load_model
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files, source_files
from flexprefill_fa.tools.rows import Row, read

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


@pytest.mark.usefixtures("tiny")
def test_the_three_commands_make_and_measure_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = held_out_files()[:FILES]
    trained_on = [file for file in source_files() if file not in held_out][: FILES + 40]
    monkeypatch.setattr("bench.needle.prepare.source_files", lambda: trained_on)
    monkeypatch.setattr("bench.needle.prepare.held_out_files", lambda: held_out)
    prepared = command(prepare, "--out", str(tmp_path))
    assert prepared.exit_code == 0, prepared.output
    assert f"of {FILES} held out" in prepared.stdout
    result = command(train, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"the model is in {tmp_path / 'model'}" in result.stdout
    assert "| vt | 0.000 |" in result.stdout and "\nQuestions of each task: 2 at 700 tokens.\n" in result.stdout
    assert f"torch {torch.__version__}, Python {platform.python_version()}, commit " in result.stdout

    monkeypatch.setattr("bench.needle.evaluate.held_out_files", lambda: held_out)
    shown = command(evaluate, "--model", str(tmp_path / "model"))
    assert shown.exit_code == 0, shown.output
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    trained = read(tmp_path / "accuracy.jsonl")
    assert [{**row, "date": None} for row in rows] == [{**row, "date": None} for row in trained]
    assert [row["task"] for row in rows] == list(EVALUATED) and rows[0]["torch"] == torch.__version__


def test_another_seed_is_another_run(work: Path, whole_run: Path, tiny: Any) -> None:
    assert command(train, "--out", str(work), "--seed", "3").exit_code == 0
    assert {row["seed"] for row in read(work / "accuracy.jsonl")} == {3}
    assert losses(work) != losses(whole_run)


@pytest.mark.usefixtures("tiny")
def test_evaluate_asks_about_text_that_is_held_out(
    corpus: Corpus, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measuring(network: Any, builder: Builder, *arguments: Any) -> Row:
        asked.append(source_drawn(builder))
        return measure(network, builder, *arguments)

    monkeypatch.setattr("bench.needle.evaluate.measure", measuring)
    result = command(evaluate, "--model", str(whole_run / "model"))
    assert result.exit_code == 0, result.output
    held_out = encode(corpus.tokenizer, [ascii_text(file) for file in held_out_files()]).tobytes()
    assert len(asked) == len(EVALUATED) and all(text in held_out for text in asked)


def test_a_model_that_misses_its_goals_is_written_and_fails(
    work: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[Settings], None]
) -> None:
    """Of the cells, one is below the goal of its length, one at it; the other length has no goal to miss."""
    tiny(replace(TINY, goals=(Goal(700, 2, 0.5), Goal(900, 2, 0.0))))

    def measuring(network: Any, builder: Builder, task: str, length: int, samples: int, seed: int) -> Row:
        exact = 0.25 if task == "vt" else 0.5
        return {"task": task, "length": length, "samples": samples, "exact": exact, "parts": 0.75}

    monkeypatch.setattr("bench.needle.evaluate.measure", measuring)
    result = command(train, "--out", str(work))
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: vt at 700 tokens must reach 0.5, got 0.250; try another --seed")
    assert f"the model is in {work / 'model'}" in result.stdout
    assert "| multikey | 0.500 | 0.500 |" in result.stdout and "| vt | 0.250 | 0.250 |" in result.stdout
    load_model(work / "model", torch.bfloat16, CPU)


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
    error: Exception, said: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> dict[str, torch.Tensor]:
        raise error

    monkeypatch.setattr("bench.needle.train.take_step", failing)
    refused(command(train, "--out", str(work)), said)


@pytest.mark.usefixtures("tiny")
def test_mistakes_are_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = "python -m bench.needle.prepare"
    refused(command(train, "--out", str(work / "none")), f"no corpus in {work / 'none' / 'corpus'} (", again)
    refused(command(evaluate, "--model", str(work)), f"the model folder {work} has no config.json")
    shutil.copytree(MODEL_DIR, work / "broken")
    (work / "broken" / "tokenizer.json").write_bytes(b"{")
    refused(command(evaluate, "--model", str(work / "broken")), f"cannot load the tokenizer in {work / 'broken'}")
    shutil.copyfile(MODEL_DIR / "tokenizer.json", work / "broken" / "tokenizer.json")
    (work / "broken" / "model.safetensors").write_bytes(b"{")
    refused(command(evaluate, "--model", str(work / "broken")), f"cannot load the model in {work / 'broken'}")
    refused(command(prepare, "--out", "/dev/null/x"), "Not a directory")
    with monkeypatch.context() as patch:
        patch.setattr("bench.needle.prepare.source_files", lambda: ())
        refused(command(prepare, "--out", str(work / "none")), "the text must hold 512 different words", "got 0")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("content", [b"", b"\xff", b"[1, 2]", b"null", b'"words"', b"{}"])
@pytest.mark.parametrize("name", ["text.npz", "tokenizer.json"])
def test_a_broken_corpus_is_named(name: str, content: bytes, work: Path) -> None:
    (work / "corpus" / name).write_bytes(content)
    refused(command(train, "--out", str(work)), f"no corpus in {work / 'corpus'} (", "bench.needle.prepare")


def test_a_gpu_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("bench.needle.evaluate.resolve_device", lambda name: torch.device("cuda"))
    refused(command(evaluate), "needs a GPU of compute capability 8.0 or more, got 7.5")
    with attention_kernel(CPU):
        assert torch.backends.cuda.math_sdp_enabled()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    with attention_kernel(torch.device("cuda")):
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()


def test_training_wants_a_gpu(work: Path) -> None:
    if not torch.cuda.is_available():
        refused(command(train, "--out", str(work)), "finds no CUDA GPU here")
