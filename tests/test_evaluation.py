"""`flexprefill eval`: rows through lm-evaluation-harness, resumed, repeated, and refused in one line."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from cli_checks import assert_refused
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'flexprefill-fa[eval]'")
from flexprefill_fa import PeakPrefillConfig
from flexprefill_fa.tools.cli import app
from flexprefill_fa.tools.evaluation.budget import Sample
from flexprefill_fa.tools.evaluation.cells import Evaluation
from flexprefill_fa.tools.evaluation.harness import Tasks
from flexprefill_fa.tools.evaluation.task_data import token_counter
from flexprefill_fa.tools.needle import MODEL_DIR, TASKS_DIR
from flexprefill_fa.tools.rows import Row, read

LENGTH = 700  # of which FlexPrefill drops blocks with a min_budget of 128 tokens
SPARSE = "flexprefill:gamma=0.5+min_budget=128"


def evaluate(out: Path, *arguments: str, model: Path = MODEL_DIR) -> Result:
    usual = ["--tasks", "needle_single", "--lengths", str(LENGTH), "--samples", "2", "--dtype", "float32"]
    return CliRunner().invoke(
        app, ["eval", "--model", str(model), "--out", str(out), "--device", "cpu", *usual, *arguments]
    )


def but_timing(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def of_lm_eval(folder: str) -> tuple[str, str]:
    """The options that find lm-eval's own tasks in one of its folders: reading all 14,000 files takes seconds."""
    import lm_eval.tasks

    return "--include-path", str(Path(lm_eval.tasks.__file__).parent / folder)


@pytest.fixture(autouse=True)
def no_report_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip, gcc and others for their versions after each run, which takes longer than it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its import lm-eval's file of RULER's needles sorts all pairs of an adjective and a noun, for seconds."""
    wonderwords = pytest.importorskip("wonderwords")
    lists = wonderwords.RandomWord._get_word_lists_by_category

    def short(self: Any, *arguments: Any) -> dict[str, list[str]]:
        return {name: words[::20] for name, words in lists(self, *arguments).items()}

    monkeypatch.setattr(wonderwords.RandomWord, "_get_word_lists_by_category", short)


@pytest.fixture
def rulers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder of lm-eval's instead of all, whose thousands of files are read for a name that is in no other."""
    import lm_eval.tasks.manager as manager

    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "ruler" / "manager.py"))


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of two layers with room for 2,048 positions."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0}
    folder = tmp_path_factory.mktemp("short")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=2048)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return folder


def test_without_a_selector(tmp_path: Path) -> None:
    out = tmp_path / "quality.jsonl"
    assert evaluate(out, "--samples", "1", "--measured-prompts", "0").exit_code == 0
    dense, sparse = read(out)
    assert (dense["selector"], sparse["selector"]) == ("dense", "peakprefill")
    assert sparse["settings"] == dataclasses.asdict(PeakPrefillConfig()) and sparse["density"] < 0.95


def test_rows_resume_repeat_and_carry_their_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, because compiling costs most of it."""
    out, again = tmp_path / "quality.jsonl", tmp_path / "again.jsonl"
    both = ("--selector", "dense", "--selector", SPARSE)
    other = {"kind": "quality", "layer": 0}  # the benchmark's rows may stand in the same file
    out.write_text(json.dumps(other) + "\n")
    result = evaluate(out, *both, "--json")
    assert result.exit_code == 0, result.output
    first, dense, flex = read(out)
    assert first == other and [json.loads(line) for line in result.stdout.splitlines()] == [dense, flex]
    assert dense["selector"] == "dense" and dense["settings"] == {} and dense["density"] == dense["recall"] == 1
    assert dense["accuracy"] == 1 and dense["wrong"] == [] and dense["metric"] == "exact"
    assert flex["selector"] == "flexprefill" and flex["settings"]["gamma"] == 0.5
    assert 0.1 < flex["density"] < 0.9 and 0.5 < flex["recall"] < 1 and flex["recall_min"] <= flex["recall"]
    for row in (dense, flex):
        assert row["kind"] == "accuracy" and row["task"] == "needle_single" and row["length"] == LENGTH
        assert (
            row["task_version"] == 4.0
            and row["limit"] == row["samples"] == 2
            and row["truncated"] == 0
            and row["seed"] == 0
            and row["dtype"] == "float32"
            and not row["mean_correction"]
            and row["dense_layers"] == []
        )
        assert len(row["model_sha256"]) == 64 and row["model"] == MODEL_DIR.name
        assert row["timing"]["prefill_ms"] > 0 and row["prompts_sha256"] == dense["prompts_sha256"]
        assert {"gpu", "torch", "transformers", "lm_eval", "commit", "python", "wonderwords"} <= set(row)

    before = out.read_bytes()
    out.write_bytes(before + b'{"kind": "accu')  # a writer that was stopped
    result = evaluate(out, *both)
    assert result.exit_code == 0 and "already" in result.stderr and out.read_bytes() == before

    run = Evaluation.run

    def interrupted(self: Evaluation, cell: Any) -> Row:
        if cell.choice.name != "dense":
            raise KeyboardInterrupt
        return run(self, cell)

    monkeypatch.setattr(Evaluation, "run", interrupted)
    result = evaluate(again, *both)
    assert result.exit_code == 130 and "1 new rows" in result.stderr and "goes on" in result.stderr
    assert len(read(again)) == 1
    monkeypatch.undo()
    result = evaluate(again, *both)
    assert result.exit_code == 0, result.output
    assert but_timing(read(again)) == but_timing([dense, flex])


@pytest.mark.usefixtures("few_words")
def test_lm_evals_own_task_runs_sparse(short_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    result = evaluate(
        out,
        *("--tasks", "niah_single_1", "--samples", "1", "--lengths", "2048,4096", "--measured-prompts", "0"),
        *of_lm_eval("ruler"),
        *("--selector", "flexprefill:gamma=0.3+min_budget=128", "--json"),
        *("--selector", "flexprefill:gamma=0.3+min_budget=128+dense_layers=-1"),
        model=short_model,
    )
    assert result.exit_code == 2, "4,096 tokens are too many for this model"
    assert result.stderr.count("length must be at most 2048, the model's position range, got 4096") == 1
    rows = read(out)  # of what could be asked
    assert [json.loads(line) for line in result.stdout.splitlines()] == rows and len(rows) == 2
    row, half = rows
    assert row["task"] == "niah_single_1" and row["length"] == 2048 and row["metric"] == "2048"
    assert row["task_version"] == 1.0
    assert row["density"] < 0.75, "the prompt ran dense"
    assert half["density"] == pytest.approx((row["density"] + 1) / 2, abs=0.05), "a dense layer counts as such"
    assert half["dense_layers"] == [-1] and row["dense_layers"] == []
    assert "dense_layers=-1" in result.stderr
    assert row["timing"]["prefill_ms"] is None


def test_a_task_without_its_data_says_which_and_takes_it_from_a_folder(
    short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    from datasets import config

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    task = ("--tasks", "infinitebench_passkey", "--selector", "dense", "--measured-prompts", "0", "--samples", "1")
    task = (*task, *of_lm_eval("infinitebench"))
    out = tmp_path / "rows.jsonl"
    assert_refused(
        evaluate(out, *task, model=short_model), "infinitebench_passkey", "xinrongzhang2022/InfiniteBench", "--data-dir"
    )
    folder = tmp_path / "data" / "xinrongzhang2022" / "InfiniteBench"
    folder.mkdir(parents=True)
    doc = {"id": 0, "context": "The pass key is 71432.", "input": "What is it?", "answer": ["71432"], "options": []}
    (folder / "passkey.jsonl").write_text(json.dumps(doc) + "\n")
    splits = "configs:\n- config_name: default\n  data_files:\n  - split: passkey\n    path: passkey.jsonl\n"
    (folder / "README.md").write_text(f"---\n{splits}---\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = evaluate(out, *task, "--data-dir", str(tmp_path / "data"), model=short_model)
    assert result.exit_code == 0, result.output
    (row,) = read(out)
    assert row["length"] is None and row["metric"] == "score" and row["density"] == 1


@pytest.mark.usefixtures("rulers_alone")
def test_lm_evals_own_tasks_are_found_without_their_folder() -> None:
    assert Tasks(["niah_single_1", "needle_single"]).names == ["niah_single_1", "needle_single"]


@pytest.mark.usefixtures("rulers_alone")
def test_mistakes_are_told_in_one_line(short_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert_refused(evaluate(out, "--lengths", "4096", model=short_model), "at most 2048", "got 4096")
    assert_refused(evaluate(out, "--lengths", "many"), "whole numbers", "'many'")
    assert_refused(evaluate(out, "--tasks", "niah_single_0"), "niah_single_0", "offline_niah_single_1")
    assert_refused(evaluate(out, "--lengths", "60"), "needle_single", "at least", "got 60")
    assert_refused(evaluate(out, "--selector", "flexprefill:alpha=1"), "has no alpha")
    assert_refused(evaluate(out, "--selector", "dense:alpha=1"), "no settings")
    assert_refused(evaluate(out, "--chat-template"), "chat template")
    assert_refused(evaluate(out, "--tasks", "openllm", *of_lm_eval("benchmarks")), "openllm", "one by one")
    assert_refused(
        evaluate(out, "--selector", "flashprefill:mean_correction=2"), "must be True, False or 'tilted', got 2"
    )
    assert_refused(evaluate(out, "--selector", "flashprefill:dense_layers=1-2"), "such as 0/4, got '1-2'")
    assert_refused(evaluate(out, "--selector", "flashprefill:dense_layers=2", model=short_model), "0 to 1", "layer 2")
    both = ("--selector", "dense", "--selector", "flashprefill:dense_layers=0/1")
    assert_refused(evaluate(out, *both, model=short_model), "must leave a layer that runs sparse", "as asked")
    assert not out.exists() or out.read_bytes() == b"", "refused before the dense cell"
    assert_refused(evaluate(out, "--include-path", str(tmp_path / "none")), "no folder")
    assert_refused(evaluate(tmp_path), "is a folder")
    assert_refused(evaluate(out, model=tmp_path / "none"), "no model folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (empty / name).write_bytes((MODEL_DIR / name).read_bytes())
    assert_refused(evaluate(out, model=empty), "cannot load the model")
    assert read(out) == []


@pytest.mark.usefixtures("few_words")
def test_a_task_is_drawn_the_same_for_the_same_seed() -> None:
    """lm-eval's own tasks draw from global random numbers, which anything may have used before."""
    tasks = Tasks(["niah_single_1"], [Path(of_lm_eval("ruler")[1])])
    metadata = {"tokenizer": str(MODEL_DIR), "max_seq_lengths": [512]}

    def prompts(seed: int) -> list[str]:
        random.random()
        return [doc["input"] for doc in list(tasks.load("niah_single_1", metadata, seed).test_docs())[:3]]

    first = prompts(1)
    assert prompts(1) == first != prompts(2)


def test_prompts_of_other_rows_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_model: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    options = ("--selector", "dense", "--measured-prompts", "0", "--samples", "1")
    assert evaluate(out, *options, model=short_model).exit_code == 0
    (row,) = read(out)
    out.write_text(json.dumps(row | {"prompts_sha256": "0" * 64, "selector": "dense"}) + "\n")
    changed = ("--selector", "vertical_slash:vertical_size=128+slash_size=128")
    result = evaluate(out, *options, *changed, model=short_model)
    assert result.exit_code == 2 and "other prompts than its earlier rows" in result.stderr


def test_rows_of_another_version_of_a_task_do_not_count(tmp_path: Path, short_model: Path) -> None:
    include, out = tmp_path / "tasks", tmp_path / "rows.jsonl"
    include.mkdir()
    options = ("--tasks", "mine", "--selector", "dense", "--measured-prompts", "0", "--samples", "1")
    options = (*options, "--include-path", str(include))
    for number, metadata in enumerate(("metadata:\n  version: 1.0\n", "metadata:\n  version: 2.0\n", "")):
        base = (TASKS_DIR / "needle_single.yaml").read_text().partition("metadata:")[0]
        (include / "mine.yaml").write_text(base.replace("needle_single", "mine") + metadata)
        assert evaluate(out, *options, model=short_model).exit_code == 0
        rows = read(out)
        assert [row["task_version"] for row in rows] == [1.0, 2.0, None][: number + 1]
        # Another version may have other prompts.
        out.write_text("".join(json.dumps(row | {"prompts_sha256": "0" * 64}) + "\n" for row in rows))
    assert "already" in evaluate(out, *options, model=short_model).stderr and len(read(out)) == 3


@pytest.mark.parametrize("prefix", ["", "The answer is"])
def test_a_chat_template_counts_too(prefix: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = (
        "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% if not loop.last %};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %};[assistant]{% endif %}"
    )
    (tokens,) = token_counter(tokenizer, True)([Sample("What is it?", ("x",), prefix)])
    start = f" {prefix}" if prefix else ""
    assert tokens == len(tokenizer(f"[user] What is it?;[assistant]{start}")["input_ids"])


def test_what_lm_eval_asks_takes_exactly_the_budget() -> None:
    """The task files agree with the recipes about prompts and the room for answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tasks = Tasks(["offline_ruler", "needle"])
    assert len(tasks.names) == 13
    for name in tasks.names:
        task = tasks.load(name, {"tokenizer": str(MODEL_DIR), "max_seq_lengths": [6000], "samples": 1})
        task.build_all_requests(limit=1, rank=0, world_size=1)
        prompt = task.instances[0].args[0]
        assert len(tokenizer(prompt)["input_ids"]) + task.config.generation_kwargs["max_gen_toks"] == 6000, name
        assert list(task.higher_is_better()) == ["string_match" if name.startswith("offline_") else "exact"]
        doc = next(iter(task.test_docs()))
        assert task.process_results(doc, [", ".join(doc["outputs"])]) == dict.fromkeys(task.higher_is_better(), 1.0)
