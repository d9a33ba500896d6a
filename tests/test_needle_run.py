"""Runs of the needle model's recipe: in pieces as in one, from each checkpoint, with the rows that they leave."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needle_runs import TINY, losses, run_of, source_drawn

from bench.needle import learning
from bench.needle.batches import Builder
from bench.needle.network import Network
from bench.needle.prepare import Corpus
from bench.needle.run import OutOfTime, Run
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.rows import read

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("stop", "crash"), [(1, False), (3, False), (3, True)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    stop: int, crash: bool, corpus: Corpus, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in time, it goes on from where it was; crashed, from its last checkpoint, after the stage of 2 steps."""
    error = RuntimeError("the machine is gone") if crash else OutOfTime()
    steps = []

    def stopping(*arguments: Any) -> dict[str, torch.Tensor]:
        if arguments[-1] == stop and not resumed:
            raise error
        steps.append(arguments[-1])
        return learning.take_step(*arguments)

    monkeypatch.setattr("bench.needle.run.take_step", stopping)
    resumed = False
    with pytest.raises(type(error)):
        run_of(tmp_path, corpus).finish()
    resumed = True
    again = run_of(tmp_path, corpus)
    expected = stop if not crash else 2 * (stop // 2)
    assert again.step == expected
    again.finish()
    assert steps == [*range(stop), *range(expected, 4)]
    assert losses(tmp_path) == losses(whole_run)
    assert read(tmp_path / "accuracy.jsonl") == read(whole_run / "accuracy.jsonl")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (whole_run / "model" / name).read_bytes()


def test_a_stop_during_the_evaluation_repeats_nothing(
    corpus: Corpus, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "accuracy.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + '\n{"step": 4, "sta')
    asked = []

    def measuring(network: Network, builder: Builder, task: str, *arguments: Any) -> Any:
        from bench.needle.evaluate import measure

        asked.append(task)
        return measure(network, builder, task, *arguments)

    monkeypatch.setattr("bench.needle.run.measure", measuring)
    run_of(tmp_path / "run", corpus).finish()
    assert asked == list(EVALUATED)[-2:]
    assert path.read_text().splitlines() == lines


def test_rows_outlive_a_crash_while_they_are_sorted_out(
    corpus: Corpus, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file operation that the machine stops at, the rows of the checkpoint's steps are still there."""
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "curve.jsonl"
    whole = path.read_text()
    later = json.dumps({**read(path)[-1], "step": 5})

    def stopping(file: Path, data: Any) -> None:
        """Of what is written, half is; what is moved stays where it was."""
        if isinstance(data, bytes):
            file.open("wb").write(data[: len(data) // 2])
        raise RuntimeError("the machine is gone")

    for broken, beyond in (
        ("os.replace", later + "\n"),
        ("pathlib.Path.write_bytes", later + "\n"),
        ("os.replace", later[:9]),
    ):
        path.write_text(whole + beyond)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(broken, stopping)
            run_of(tmp_path / "run", corpus)
        assert path.read_text() == whole + beyond
        run_of(tmp_path / "run", corpus)
        assert path.read_text() == whole
        assert sorted(file.name for file in path.parent.iterdir()) == [
            "accuracy.jsonl",
            "checkpoint.pt",
            "curve.jsonl",
            "model",
        ]


def test_a_loss_that_is_no_number_stops_the_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(network: Network, *arguments: Any) -> dict[str, torch.Tensor]:
        outcome = learning.take_step(network, *arguments)
        if arguments[-1] == 2:
            network.model.norm.weight.data.fill_(float("nan"))
        return outcome

    monkeypatch.setattr("bench.needle.run.take_step", spoiling)
    with pytest.raises(ValueError, match="step 4, the checkpoint is of 2"):
        run_of(tmp_path, corpus).finish()
    assert run_of(tmp_path, corpus).step == 2


def test_another_runs_checkpoint_is_refused(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    shutil.copyfile(whole_run / "checkpoint.pt", file)
    assert run_of(tmp_path, corpus).step == 4
    for other in (replace(corpus, train=corpus.train[1:]), replace(corpus, held_out=corpus.held_out[1:])):
        with pytest.raises(UsageError, match=r"a checkpoint of another run in .*: remove it, or name another folder"):
            run_of(tmp_path, other)
    with pytest.raises(UsageError, match="a checkpoint of another run"):
        run_of(tmp_path, corpus, replace(TINY, seed=1))
    for broken in (file.read_bytes()[:1000], b"", b"null"):
        file.write_bytes(broken)
        with pytest.raises(UsageError, match=r"no checkpoint that can be read \(.*: remove it"):
            run_of(tmp_path, corpus)


def test_a_checkpoint_is_replaced_whole(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine stops while the second checkpoint is written."""
    written = []

    def stopping(file: Path, data: Any) -> int:
        written.append(data)
        if len(written) > 1:
            file.open("wb").write(data[: len(data) // 2])
            raise RuntimeError("the machine is gone")
        return file.open("wb").write(data)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("pathlib.Path.write_bytes", stopping)
        run_of(tmp_path, corpus).finish()
    assert run_of(tmp_path, corpus).step == 2


def test_what_is_trained_on_is_apart_from_what_is_asked(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, asked = set(), set()

    def training(network: Network, optimizer: Any, builder: Builder, *arguments: Any) -> dict[str, torch.Tensor]:
        trained.add(source_drawn(builder))
        return learning.take_step(network, optimizer, builder, *arguments)

    def measuring(network: Network, builder: Builder, task: str, length: int, *arguments: Any) -> dict[str, Any]:
        asked.add(source_drawn(builder))
        return {"task": task, "length": length, "exact": 1, "parts": 1}

    monkeypatch.setattr("bench.needle.run.take_step", training)
    monkeypatch.setattr("bench.needle.run.measure", measuring)
    run_of(tmp_path, corpus).finish()
    assert trained and all(text in corpus.train.tobytes() for text in trained)
    assert asked and all(text in corpus.held_out.tobytes() for text in asked)


def test_a_row_of_the_curve_is_a_mean(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    run_of(tmp_path, corpus, replace(TINY, steps_per_row=2)).finish()
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


def test_stops_come_after_whole_rows(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stages of 5 steps in rows of 2, and a stage's last row is the shorter; each run has time for one thing."""
    settings = replace(TINY, stages=tuple(replace(stage, steps=5) for stage in TINY.stages), steps_per_row=2)
    run_of(tmp_path / "whole", corpus, settings).finish()
    asked: list[float] = []

    def require(run: Run, seconds: float) -> None:
        asked.append(seconds)
        if len(asked) > 1:
            raise OutOfTime

    monkeypatch.setattr(Run, "_require", require)
    stops = [0]
    while stops[-1] < 10:
        run = run_of(tmp_path / "pieces", corpus, settings)
        assert run.step == stops[-1]
        asked.clear()
        with suppress(OutOfTime):
            run.finish()
        stops.append(run.step)
        assert len(stops) < 30
    ends = [2, 4, 5, 6, 8, 10]
    assert sorted(set(stops)) == [0, *ends]
    assert [row["step"] for row in losses(tmp_path / "whole")] == ends
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
