"""The needle model's recipe on the CPU at a size that learns nothing: corpus, training in pieces, release, commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from bench.needle import MODEL_DIR, checkpoint, learning
from bench.needle.batches import Builder
from bench.needle.card import write_card
from bench.needle.corpus import Corpus, build_corpus, load_corpus
from bench.needle.evaluate import evaluate
from bench.needle.evaluation import Accuracy, predictions
from bench.needle.formats import EVALUATED, Mix
from bench.needle.network import Network, Shape
from bench.needle.pace import Clock, OutOfTime
from bench.needle.prepare import prepare
from bench.needle.prompts import key_words
from bench.needle.release import export, load_release
from bench.needle.run import Run, require_flash
from bench.needle.run_tables import run_tables
from bench.needle.settings import FULL, SIZES, TINY, Goal, Settings
from bench.needle.source import held_out_files
from bench.needle.train import check_memory, train
from bench.paths import ROOT
from flexprefill_fa.digests import model_sha256
from flexprefill_fa.loading import UsageError
from flexprefill_fa.rows import read

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FILES = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("work") / "corpus", 131072, files=FILES)


@pytest.fixture
def work(tmp_path: Path, corpus: Corpus) -> Path:
    """A work folder with a corpus."""
    shutil.copytree(corpus.folder, tmp_path / "corpus")
    return tmp_path


def run_of(folder: Path, corpus: Corpus, settings: Settings = TINY, minutes: float | None = None) -> Run:
    return Run(settings, corpus, folder, CPU, Clock(minutes), False, lambda line: None)


def command(function: Any, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, arguments)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{**row, "tokens_per_second": 0} for row in read(folder / "curve.jsonl")]


@pytest.fixture(scope="module")
def whole_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tests' own fixture comes later
    rows = run_of(folder, corpus).finish()
    assert [(row["task"], row["length"]) for row in rows] == [(task, 700) for task in EVALUATED]
    assert {(row["kind"], row["model_sha256"], row["seed"]) for row in rows} == {
        ("needle", model_sha256(folder / "model"), 0)
    }
    torch.set_num_threads(threads)
    return folder


def test_a_corpus_is_the_same_each_time_and_apart_from_what_is_held_out(corpus: Corpus, tmp_path: Path) -> None:
    again = build_corpus(tmp_path, 131072, files=FILES)
    assert again.facts == corpus.facts
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.held_out, corpus.held_out)
    for name in ("tokenizer.json", "tokenizer_config.json", "corpus.json"):
        assert (tmp_path / name).read_bytes() == (corpus.folder / name).read_bytes()
    assert corpus.held_out[:200].tobytes() not in corpus.train.tobytes()
    assert len(key_words(corpus.tokenizer)) == 512


def test_the_tasks_words_are_single_tokens(corpus: Corpus) -> None:
    text = "\nQuestion: which variables hold the special magic numbers? Answer: VAR"
    assert len(corpus.tokenizer.encode(text).ids) == len(re.findall(r"\n| ?\w+|\S", text))


def test_what_a_stage_trains_on_fits_its_sequences(corpus: Corpus) -> None:
    builder = Builder(corpus.tokenizer, corpus.train, CPU)
    for stage in FULL.stages:
        assert stage.rows % len(stage.mixes_at(0)) == 0
        for mix in (mix for step in range(3) for mix, _ in stage.mixes_at(step)):
            assert mix.names <= 512
            assert builder.least_length(mix) < 0.97 * stage.length


def test_the_network_is_the_llama_that_is_released(corpus: Corpus, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = Network(replace(TINY.shape, layers=3, heads=8, kv_heads=2))
    export(network, corpus, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_release(tmp_path, CPU).float()
    tokens = torch.from_numpy(corpus.held_out[:300].astype(np.int64))[None]
    with torch.no_grad():
        expected, found = model(tokens).logits, ours.logits(ours(tokens))
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == ours.shape.parameters
    told = {name: value for name, value in ours.shape.config().items() if name != "dtype"}
    assert {"hidden_size", "num_key_value_heads", "rope_parameters", "rms_norm_eps"} < told.keys()
    assert {name: getattr(model.config, name) for name in told} == told
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = "def f(x):\n    return 12 #" + key_words(corpus.tokenizer)[0][1:]
    assert tokenizer(words)["input_ids"] == corpus.tokenizer.encode(words).ids
    assert tokenizer.bos_token_id == model.config.bos_token_id and tokenizer.eos_token_id == model.config.eos_token_id


def test_the_full_model_and_its_checkpoint_are_small(tmp_path: Path) -> None:
    network = Network(Shape())
    assert FULL.shape == Shape() and 2 * Shape().parameters < 15e6
    optimizer = learning.make_optimizer(network, FULL)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    checkpoint.save(tmp_path / "checkpoint", network, optimizer, {"step": 7})
    sizes = [file.stat().st_size for file in (tmp_path / "checkpoint").iterdir()]
    assert max(sizes) < 16 * 2**20 and len(sizes) <= 8
    other = Network(Shape())
    restored = learning.make_optimizer(other, FULL)
    assert checkpoint.load(tmp_path / "checkpoint", other, restored, {}) == 7
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for average in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one][average], restored.state[two][average])


@pytest.mark.parametrize(("stop", "crash"), [(1, False), (3, False), (3, True)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    stop: int, crash: bool, corpus: Corpus, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in time, it goes on from where it was; crashed, from its last checkpoint, after the stage of 2 steps."""
    error = RuntimeError("the machine is gone") if crash else OutOfTime()
    steps = []

    def stopping(*arguments: Any) -> learning.Outcome:
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
    assert again.step == again.saved_step == expected
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
        from bench.needle.evaluation import measure

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
            "checkpoint",
            "curve.jsonl",
            "model",
        ]


def test_a_loss_that_is_no_number_stops_the_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiling(network: Network, *arguments: Any) -> learning.Outcome:
        outcome = learning.take_step(network, *arguments)
        if arguments[-1] == 2:
            network.model.norm.weight.data.fill_(float("nan"))
        return outcome

    monkeypatch.setattr("bench.needle.run.take_step", spoiling)
    with pytest.raises(ArithmeticError, match="step 4; the checkpoint is of step 2"):
        run_of(tmp_path, corpus).finish()
    assert run_of(tmp_path, corpus).step == 2


def test_another_runs_checkpoint_is_refused(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "checkpoint", tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=r"is of another run .settings is .*remove it, or name another folder"):
        run_of(tmp_path, corpus, replace(TINY, seed=1))
    other = replace(corpus, facts={**corpus.facts, "digest": "other"})
    with pytest.raises(UsageError, match=r"is of another run .corpus is"):
        run_of(tmp_path, other)
    (part,) = (tmp_path / "checkpoint").glob("part-*")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        run_of(tmp_path, corpus)
    part.unlink()
    with pytest.raises(UsageError, match="is not whole"):
        run_of(tmp_path, corpus)


def test_a_checkpoint_that_was_being_replaced_is_found(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "checkpoint", tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    assert run_of(tmp_path, corpus).step == 4


def test_learning_lowers_the_loss(corpus: Corpus) -> None:
    """On the same sequences again and again, which is what the gradients of every part are for."""
    torch.manual_seed(0)
    settings = replace(TINY, shape=replace(TINY.shape, layers=1))
    network = Network(settings.shape)
    optimizer = learning.make_optimizer(network, settings)
    builder = Builder(corpus.tokenizer, corpus.train, CPU)
    rows = [learning.mean_row([learning.take_step(network, optimizer, builder, settings, 3)]) for _ in range(12)]
    for name in ("loss", "text", "multikey", "multivalue", "multiquery", "vt"):
        assert rows[-1][name] < 0.9 * rows[0][name], name


def test_predictions_are_greedy_decoding(corpus: Corpus) -> None:
    """Of a network that says something else at every place, from the tokens before the place alone."""
    network = Network(TINY.shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    builder = Builder(corpus.tokenizer, corpus.held_out, CPU)
    batch = builder.build(2, 450, EVALUATED["multiquery"], torch.Generator().manual_seed(0), questions_last=True)
    with torch.no_grad():
        said = predictions(network, batch)
        assert said.shape == batch.places.shape
        for tokens, places, words in zip(batch.tokens, batch.places, said, strict=True):
            assert len(set(words.tolist())) > 20
            for place, word in zip(places, words, strict=True):
                assert word == network.logits(network(tokens[None, :place]))[0, -1].argmax()


def test_a_steps_sequences_are_those_of_its_stage(corpus: Corpus) -> None:
    builder = Builder(corpus.tokenizer, corpus.train, CPU)
    number, _ = TINY.locate(2)
    open_end, closed = learning.draw(builder, TINY, 2, learning.generator_of(CPU, 0, 2))
    assert TINY.stages[number].closing and closed.tokens.shape == open_end.tokens.shape == (1, 640)
    last = closed.places.max()
    assert last == 639, "a question at the very end"
    assert {task for task, _ in closed.columns} == {0, 3}
    assert {task for task, _ in open_end.columns} == {0, 1, 2, 3}


def test_a_mix_with_few_questions_counts_as_much_as_one_with_many(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mixes with losses of one value each, whatever the network: their mean, not that of all questions."""
    builder = Builder(corpus.tokenizer, corpus.train, CPU)
    few, many = (
        builder.build(1, 640, Mix(needles=8, asked=asked), torch.Generator().manual_seed(asked)) for asked in (1, 7)
    )
    network = Network(TINY.shape)
    parts = tuple(torch.zeros(1, 640, TINY.shape.hidden) for _ in range(2))
    values = iter((torch.full((few.targets.numel(),), 1.0), torch.full((many.targets.numel(),), 3.0)))
    monkeypatch.setattr(learning.F, "cross_entropy", lambda *_, **__: next(values))
    found = learning._answer_losses(network, [few, many], parts)["multikey"]
    assert found.weighted.item() == found.plain.item() == 2.0
    assert found.last_right is None


def test_what_is_right_where_questions_come_last_is_told_apart(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches one ends with its questions, and they alone are answered right."""
    builder = Builder(corpus.tokenizer, corpus.train, CPU)
    mix, generator = Mix(needles=4, asked=2), torch.Generator().manual_seed(0)
    open_end, closed = (builder.build(1, 640, mix, generator, questions_last=last) for last in (False, True))
    network = Network(TINY.shape)
    right = torch.nn.functional.one_hot(closed.targets, TINY.shape.vocabulary).float()
    said = iter((torch.zeros_like(right), right))
    monkeypatch.setattr(network, "logits", lambda hidden: next(said))
    parts = tuple(torch.zeros(1, 640, TINY.shape.hidden) for _ in range(2))
    found = learning._answer_losses(network, [open_end, closed], parts)["multikey"]
    assert found.right.item() == 0.5
    assert found.last_right is not None and found.last_right.item() == 1.0


def test_the_learning_rate_rises_holds_and_falls() -> None:
    rates = [FULL.learning_rate(step) for step in range(FULL.steps)]
    assert rates[0] == FULL.peak / FULL.warm_up and max(rates) == FULL.peak
    top = rates.index(FULL.peak)
    assert top == FULL.warm_up - 1
    assert all(after <= before for before, after in zip(rates[top:], rates[top + 1 :], strict=False))
    assert FULL.last * FULL.peak <= rates[-1] < 0.05 * FULL.peak
    assert FULL.hold == 0.35 and FULL.last == 0.03
    for number, done in enumerate((0.0, 0.16, 0.34, 0.54, 0.7, 0.85)):
        first = sum(stage.steps for stage in FULL.stages[:number])
        assert FULL.locate(first) == (number, 0)
        assert rates[max(first, top)] == pytest.approx(FULL.peak * min(1, 1 - (done - 0.35) / 0.65 * 0.97))
    half = FULL.scaled(0.5, 0)
    assert half.steps == pytest.approx(FULL.steps / 2, abs=3) and half.digest() != FULL.digest()
    with pytest.raises(ValueError, match=f"step must be below {FULL.steps}, got {FULL.steps}"):
        FULL.locate(FULL.steps)


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


def test_a_stage_that_leaves_a_task_unlearnt_is_warned_of(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"single": 0.88, "multikey": 1.0, "multivalue": 0.9, "multiquery": 0.0, "vt": 1.0}
    monkeypatch.setattr(
        "bench.needle.run.measure", lambda network, builder, task, length, samples, seed: Accuracy(found[task], 1, 2)
    )
    said: list[str] = []
    Run(TINY, corpus, tmp_path, CPU, Clock(None), False, said.append).finish()
    warnings = [line.split(":")[1] for line in said if line.startswith("warning: ")]
    there = [(row["stage"], row["task"]) for row in read(tmp_path / "accuracy.jsonl")]
    assert [task for stage, task in there if stage == "stage 0"] == ["single", "vt"], "no more fit 256 tokens"
    assert [task for stage, task in there if stage == "stage 1"] == ["single", "multivalue", "multiquery", "vt"]
    expected = [("stage 0", "single"), ("stage 1", "single"), ("stage 1", "multiquery")]
    assert warnings == [f" {stage} leaves {task} at {found[task]:.3f}" for stage, task in expected]


def test_a_row_of_the_curve_is_a_mean(corpus: Corpus, whole_run: Path, tmp_path: Path) -> None:
    run_of(tmp_path, corpus, replace(TINY, steps_per_row=2)).finish()
    single, double = losses(whole_run), losses(tmp_path)
    assert [row["step"] for row in single] == [1, 2, 3, 4] and [row["step"] for row in double] == [2, 4]
    for stage, row in enumerate(double):
        first, second = single[2 * stage : 2 * stage + 2]
        assert row.keys() == first.keys() == second.keys()
        for name in ("stage", "tokens", "learning_rate"):
            assert row[name] == second[name]
        means = row.keys() - {"step", "stage", "tokens", "learning_rate", "tokens_per_second"}
        assert {"loss", "text", "norm", "multikey", "multikey_right", "vt", "vt_right"} <= means
        for name in means:
            assert row[name] == pytest.approx((first[name] + second[name]) / 2, abs=2e-5), name
    # Only the second stage has sequences that end with their questions, about single numbers and chains.
    last = [{name for name in row if name.endswith("_last_right")} for row in double]
    assert last == [set(), {"multikey_last_right", "vt_last_right"}]


class Interrupting(Clock):
    """Lets a run go on a few times, however long anything takes."""

    def __init__(self, times: int):
        super().__init__(None)
        self.left = times

    def require(self, seconds: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise OutOfTime


def test_stops_come_after_whole_rows(corpus: Corpus, tmp_path: Path) -> None:
    """Of stages of 5 steps in rows of 2, and a stage's last row is the shorter."""
    settings = replace(TINY, stages=tuple(replace(stage, steps=5) for stage in TINY.stages), steps_per_row=2)
    run_of(tmp_path / "whole", corpus, settings).finish()
    stops = [0]
    while stops[-1] < 10 or len(stops) < 3:
        run = Run(settings, corpus, tmp_path / "pieces", CPU, Interrupting(2), False, lambda line: None)
        assert run.step == stops[-1]
        with suppress(OutOfTime):
            run.finish()
        assert run.saved_step == run.step
        stops.append(run.step)
        assert len(stops) < 30
    ends = [2, 4, 5, 6, 8, 10]
    assert sorted(set(stops)) == [0, *ends]
    assert [row["step"] for row in losses(tmp_path / "whole")] == ends
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")


def test_the_card_says_how_many_questions_each_length_had(corpus: Corpus, tmp_path: Path) -> None:
    facts = {"gpu": "X", "torch": "2", "python": "3.12.3", "commit": "abc", "date": "2026-11-23"}
    rows = [
        {"task": task, "length": goal.length, "samples": goal.samples, "exact": 0.9, "parts": 1.0, **facts}
        for goal in FULL.goals
        for task in EVALUATED
    ]
    write_card(tmp_path, rows, FULL, corpus)
    card = (tmp_path / "README.md").read_text()
    said = "512 at 4,096, 8,192, 16,384 tokens; 256 at 32,768 tokens; 128 at 65,536 tokens"
    assert f"\nQuestions of each task: {said}.\nX, torch 2, Python 3.12.3, commit abc, 2026-11-23.\n" in card
    assert all(f"| {stage.length:,} | {stage.rows} | {stage.steps:,} |" in card for stage in FULL.stages)
    assert "{" not in card and max(map(len, card.splitlines())) < 125


def test_too_little_time_is_a_stop(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.needle.run._FIRST_ROW_SECONDS", 200.0)
    result = command(train, "--out", str(work), "--size", "tiny", "--device", "cpu", "--minutes", "3")
    assert result.exit_code == 3
    assert "stopped at step 0 of 4: the same command goes on from there" in result.stdout


def test_mistakes_are_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("--out", str(work), "--size", "tiny", "--device", "cpu")
    if not torch.cuda.is_available():
        refused(command(train, "--out", str(work)), "finds no CUDA GPU here")
    refused(command(train, *tiny[:2], "--size", "huge"), "size must be one of full, tiny, got 'huge'")
    refused(command(train, *tiny, "--steps-scale", "0"), "steps-scale must be above 0")
    refused(command(train, "--out", str(work / "none"), *tiny[2:]), "no corpus", "python -m bench.needle.prepare")
    refused(command(evaluate, "--model", str(work)), f"no needle model in {work}")
    refused(command(evaluate, "--tasks", "single,double"), "tasks must be of", "got 'double'")
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


def test_a_corpus_is_read_back_whole(corpus: Corpus) -> None:
    again = load_corpus(corpus.folder)
    assert again.facts == corpus.facts and np.array_equal(again.train, corpus.train)


def test_a_table_for_each_model_and_the_shipped_one_is_marked() -> None:
    facts = {"kind": "needle", "seed": 0, "gpu": "X", "torch": "2", "commit": "abc", "date": "2026-11-23"}
    cells = [("vt", 4096, 512, 0.5), ("vt", 8192, 128, 0.25), ("single", 4096, 512, 1.0), ("vt", 4096, 512, 0.75)]
    rows = [
        {"task": task, "length": length, "samples": samples, "exact": exact, "model_sha256": model, **facts}
        for model in ("f" * 64, model_sha256(MODEL_DIR))
        for task, length, samples, exact in cells
    ]
    shipped, other = run_tables(rows).split("\n\n**")
    assert "| vt | 0.750 | 0.250 |" in other and "| single | 1.000 | - |" in other
    assert "ffffffffff" in other and "bench/needle/model" not in other
    assert "512 at 4,096 tokens; 128 at 8,192 tokens. X, torch 2, commit abc" in other
    assert "(`bench/needle/model`)" in shipped and "| vt | 0.750 | 0.250 |" in shipped
