"""The needle model's commands: prepare, train and evaluate, what they say, and their mistakes in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needle_runs import CPU, FILES, command, losses, refused, source_drawn

from bench.needle import learning
from bench.needle.batches import Builder
from bench.needle.corpus import Corpus, encode
from bench.needle.evaluate import evaluate
from bench.needle.evaluation import Accuracy
from bench.needle.network import Network
from bench.needle.prepare import prepare
from bench.needle.release import load_release
from bench.needle.run import require_flash
from bench.needle.settings import FULL, SIZES, TINY, Goal
from bench.needle.train import check_memory, train
from bench.paths import ROOT
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files
from flexprefill_fa.tools.rows import read

pytestmark = pytest.mark.usefixtures("one_thread")


def test_train_says_what_it_does_and_writes_a_card(
    work: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--out", str(work), "--size", "tiny", "--device", "cpu")
    result = command(train, *arguments)
    assert result.exit_code == 0, result.output
    assert "4 steps, 0.26 M parameters; at step 0" in result.stdout
    assert f"the model is in {work / 'model'}" in result.stdout
    assert losses(work) == losses(whole_run)
    card = (work / "model" / "README.md").read_text()
    assert "| vt | 0.000 |" in card and "python -m bench.needle.train" in card and "{" not in card
    assert "\nQuestions of each task: 2 at 700 tokens.\n" in card
    assert "seed 0, 4 steps (" in card and "| 256 | 2 | 2 |\n| 640 | 2 | 2 |\n\n" in card
    assert command(train, *arguments).exit_code == 0  # nothing left to do

    rows = work / "rows.jsonl"
    monkeypatch.setattr("bench.needle.evaluate.held_out_files", lambda: held_out_files()[:FILES])
    shown = command(
        evaluate, "--model", str(work / "model"), "--device", "cpu", "--samples", "2", "--lengths", "700",
        "--tasks", "vt", "--out", str(rows),
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    (row,) = read(rows)
    assert row["task"] == "vt" and row["samples"] == 2 and row["exact"] == 0 and row["torch"] == torch.__version__
    assert json.loads(shown.stdout) == row


def test_the_card_of_a_run_with_options_names_them(work: Path) -> None:
    tiny = ("--out", str(work), "--size", "tiny", "--device", "cpu")
    result = command(train, *tiny, "--steps-scale", "0.5", "--seed", "3")
    assert result.exit_code == 0 and "2 steps, " in result.stdout, result.output
    card = (work / "model" / "README.md").read_text()
    assert "\n    python -m bench.needle.train --size tiny --steps-scale 0.5 --seed 3\n" in card
    assert "seed 3, 2 steps (" in card and "| 256 | 2 | 1 |\n| 640 | 2 | 1 |\n\n" in card
    assert {row["seed"] for row in read(work / "accuracy.jsonl") if row["stage"] == "model"} == {3}


def test_evaluate_asks_about_text_that_is_held_out(
    corpus: Corpus, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measuring(network: Network, builder: Builder, task: str, length: int, samples: int, seed: int) -> Accuracy:
        asked.append(source_drawn(builder))
        return Accuracy(1, 1, samples)

    monkeypatch.setattr("bench.needle.evaluate.measure", measuring)
    result = command(evaluate, "--model", str(whole_run / "model"), "--device", "cpu", "--lengths", "700")
    assert result.exit_code == 0, result.output
    held_out = encode(corpus.tokenizer, [ascii_text(file) for file in held_out_files()]).tobytes()
    assert len(asked) == len(EVALUATED) and all(text in held_out for text in asked)


def test_a_model_that_misses_its_goals_is_written_and_fails(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cells, one is below the goal of its length, one at it; the other length has no goal to miss."""
    wanted = (Goal(700, 2, 0.5), Goal(900, 2, 0.0))
    monkeypatch.setitem(SIZES, "tiny", replace(TINY, goals=wanted))

    def measuring(network: Network, builder: Builder, task: str, length: int, samples: int, seed: int) -> Accuracy:
        return Accuracy(0.25 if task == "vt" else 0.5, 0.75, samples)

    monkeypatch.setattr("bench.needle.run.measure", measuring)
    arguments = ("--out", str(work), "--size", "tiny", "--device", "cpu")
    for _ in range(2):  # the second time there is nothing left to do
        result = command(train, *arguments)
        assert result.exit_code == 1, result.output
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: vt at 700 tokens must reach 0.5, got 0.250; try another --seed")
        assert f"the model is in {work / 'model'}" in result.stdout
        card = (work / "model" / "README.md").read_text()
        assert "| multikey | 0.500 | 0.500 |" in card and "| vt | 0.250 | 0.250 |" in card
        load_release(work / "model", CPU)


def test_too_little_time_is_a_stop(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.needle.run._FIRST_ROW_SECONDS", 200.0)
    result = command(train, "--out", str(work), "--size", "tiny", "--device", "cpu", "--minutes", "3")
    assert result.exit_code == 3
    assert "stopped at step 0 of 4: the same command goes on from there" in result.stdout


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
    """In the second step of the second stage of two, with a checkpoint after the first stage."""

    def failing(*arguments: Any) -> learning.Outcome:
        if arguments[-1] == 3:
            raise error
        return learning.take_step(*arguments)

    monkeypatch.setattr("bench.needle.run.take_step", failing)
    result = command(train, "--out", str(work), "--size", "tiny", "--device", "cpu")
    refused(result, said, "; the checkpoint is of step 2")


def test_a_time_in_which_no_step_fits_is_refused(work: Path) -> None:
    result = command(train, "--out", str(work), "--size", "tiny", "--device", "cpu", "--minutes", "1")
    assert result.exit_code == 2 and "--minutes" in result.stderr, result.output
    assert [file.name for file in work.iterdir()] == ["corpus"]


def test_what_cannot_be_done_is_refused_before_it_takes_time(whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*arguments: Any) -> Any:
        raise AssertionError("this takes time")

    monkeypatch.setattr("bench.needle.evaluate.held_out_files", lambda: held_out_files()[:FILES])
    monkeypatch.setattr("bench.needle.evaluate.measure", unwanted)
    monkeypatch.setattr("bench.needle.corpus.train_tokenizer", unwanted)
    arguments = ("--model", str(whole_run / "model"), "--device", "cpu")
    refused(command(evaluate, *arguments, "--lengths", "700", "--out", "/dev/null/x/r.jsonl"), "Not a directory")
    refused(command(evaluate, *arguments, "--lengths", "700,300"), "lengths must be at least ", ", got 300")
    message = "lengths must be at most ", ", the tokens of held-out text, got 400000"
    refused(command(evaluate, *arguments, "--lengths", "700,400000"), *message)
    refused(command(prepare, "--out", "/dev/null/x"), "Not a directory")


def test_mistakes_are_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("--out", str(work), "--size", "tiny", "--device", "cpu")
    if not torch.cuda.is_available():
        refused(command(train, "--out", str(work)), "finds no CUDA GPU here")
    refused(command(train, *tiny[:2], "--size", "huge"), "size must be one of full, tiny, got 'huge'")
    for scale in ("0", "inf", "nan"):
        refused(command(train, *tiny, "--steps-scale", scale), "steps-scale must be a number above 0")
    refused(command(train, "--out", str(work / "none"), *tiny[2:]), "no corpus", "python -m bench.needle.prepare")
    refused(command(evaluate, "--model", str(work)), f"no needle model in {work}")
    refused(command(evaluate, "--tasks", "single,double"), "tasks must be of", "got 'double'")
    shutil.copytree(MODEL_DIR, work / "broken")
    (work / "broken" / "tokenizer.json").write_bytes(b"{")
    refused(command(evaluate, "--model", str(work / "broken")), "tokenizer.json cannot be read")
    with monkeypatch.context() as patch:
        patch.setattr("bench.needle.corpus.all_forms", lambda: [])
        refused(command(train, *tiny), "made by another version", "python -m bench.needle.prepare")
    with monkeypatch.context() as patch:
        patch.setattr("bench.needle.corpus.source_files", lambda: ())
        refused(command(prepare, "--out", str(work / "none")), "has no source text")
    (work / "corpus" / "train.npy").write_bytes(b"nothing")
    refused(command(train, *tiny), "cannot be read", "python -m bench.needle.prepare")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1, 2]", b"null", b'"words"', b"{}"])
@pytest.mark.parametrize("name", ["corpus/corpus.json", "corpus/train.npy", "checkpoint/state.json"])
def test_a_broken_file_is_named(name: str, content: bytes, work: Path, whole_run: Path) -> None:
    shutil.copytree(whole_run / "checkpoint", work / "checkpoint")
    (work / name).write_bytes(content)
    folder, help = (work / name).parent, {"corpus": "bench.needle.prepare", "checkpoint": "remove it, or name another"}
    result = command(train, "--out", str(work), "--size", "tiny", "--device", "cpu")
    refused(result, f"the {folder.name} in {folder} cannot be read (", help[folder.name])


def test_a_corpus_with_other_tokens_is_refused(work: Path) -> None:
    path = work / "corpus" / "train.npy"
    tokens = np.load(path)
    tokens[5] += 1
    np.save(path, tokens)
    refused(command(train, "--out", str(work), "--size", "tiny", "--device", "cpu"), "made by another version")


@pytest.mark.parametrize("package", ["numpy", "tokenizers", "safetensors"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"this command needs {package}: pip install 'flexprefill-fa[bench]' ("
    refused(command(train, "--out", str(tmp_path)), message)
    refused(command(prepare, "--out", str(tmp_path)), message)
    refused(command(evaluate, "--model", str(tmp_path)), message)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_start_without_the_extra() -> None:
    """In a Python of its own, since here the packages were imported long ago."""
    code = "import sys; sys.modules.update(dict.fromkeys(('numpy', 'tokenizers', 'safetensors'))); " + "; ".join(
        f"import bench.needle.{module}" for module in ("train", "prepare", "evaluate")
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("function", [train, evaluate])
def test_a_gpu_without_the_kernel_is_refused_before_anything(
    function: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = torch.device("cuda")
    found = {"get_device_capability": (7, 5), "get_device_name": "Tesla T4"}
    for name, value in found.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    monkeypatch.setattr(f"bench.needle.{function.__name__}.resolve_device", lambda name: gpu)
    option = "--out" if function is train else "--model"
    refused(command(function, option, str(tmp_path)), "compute capability 8.0 or more, and cuda (Tesla T4) has 7.5")
    require_flash(CPU)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    require_flash(gpu)


def test_too_little_memory_is_said_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (8 * 2**30, 80 * 2**30))
    message = r"training needs about \d\d GiB of GPU memory, and 8 GiB are free on cuda"
    with pytest.raises(UsageError, match=message):
        check_memory(FULL, torch.device("cuda"))
    check_memory(TINY, torch.device("cuda"))
    check_memory(FULL, CPU)
    assert 24.3 <= FULL.memory() / 2**30 < 26, "on a GPU its peak was 24.3 GiB"
    assert TINY.memory() < 1.1 * 2**30
