"""`flexprefill fidelity`: rows that say what a plain comparison says, resumed and drawn; settings that are found."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner, Result

from flexprefill_fa import PeakPrefillConfig
from flexprefill_fa.choice import parse_choice
from flexprefill_fa.integrations.transformers import enable_sparse_prefill
from flexprefill_fa.tools.cli import app
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.fidelity.cells import Fidelity
from flexprefill_fa.tools.fidelity.plot import curves
from flexprefill_fa.tools.fidelity.texts import read_tokens
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row, read

LENGTH, LONGER = 512, 640
SKIP = 128
LITTLE = "sink_blocks=1+window_blocks=1+last_full_blocks=0"
SPEC = f"flashprefill:alpha=0.2+{LITTLE}"


def fidelity(out: Path, *arguments: str, model: Path = MODEL_DIR) -> Result:
    usual = ["--lengths", str(LENGTH), "--skip", str(SKIP), "--dtype", "float32", "--device", "cpu"]
    return CliRunner().invoke(app, ["fidelity", "--model", str(model), "--out", str(out), *usual, *arguments])


def but_timing(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def tokens(text: int, length: int = LENGTH) -> torch.Tensor:
    """Of the corpus of that number."""
    return torch.tensor([read_tokens(AutoTokenizer.from_pretrained(MODEL_DIR), (), length)[text].first(length)])


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, SKIP:-1].double().log_softmax(-1)


def kl_of(dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    return F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1)


@needs.mean_correction
def test_rows_say_what_a_plain_comparison_says(tmp_path: Path, needle_model: PreTrainedModel) -> None:
    out, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    other = {"kind": "accuracy", "task": "vt"}  # other rows may stand in the same file
    out.write_text(json.dumps(other) + "\n")
    specs = ("--selector", SPEC, "--selector", SPEC + "+dense_layers=0/-1")
    result = fidelity(out, *specs, "--lengths", str(LONGER), "--plot", str(picture), "--json")
    assert result.exit_code == 0, result.output
    first, *rows = read(out)
    assert first == other and [json.loads(line) for line in result.stdout.splitlines()] == rows
    assert [(row["text"], row["dense_layers"]) for row in rows] == [
        (text, layers) for layers in ([], [-1, 0]) for text in ("source", "prose")
    ]
    for number, row in enumerate(rows):
        choice = parse_choice(SPEC)
        dense_layers = (0, -1) if row["dense_layers"] else ()
        ids = tokens(number % 2, LONGER)
        dense = log_probabilities(needle_model, ids)
        with enable_sparse_prefill(
            needle_model, choice.config, dense_layers=dense_layers, statistics="recall"
        ) as handle:
            sparse = log_probabilities(needle_model, ids)
        kept = handle.statistics
        kl, targets = kl_of(dense, sparse), ids[0, SKIP + 1 :]
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3) and row["kl"] > 1e-4
        assert row["kl_99"] == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
        assert row["dense_loss"] == pytest.approx(F.nll_loss(dense, targets).item(), abs=2e-5)
        assert row["loss"] == pytest.approx(F.nll_loss(sparse, targets).item(), abs=2e-5)
        assert row["loss_difference"] == pytest.approx(row["loss"] - row["dense_loss"], abs=2e-5)
        same = (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item()
        assert row["same_top"] == pytest.approx(same, abs=2 / row["positions"]) and row["positions"] == len(kl)
        layers = range(needle_model.config.num_hidden_layers)
        assert row["layers"] == list(layers) and set(kept) == {
            layer for layer in layers if layer - 6 not in dense_layers and layer not in dense_layers
        }
        density = [kept[layer].density.mean().item() if layer in kept else 1.0 for layer in layers]
        recall = [
            layer_recall.mean().item() if layer in kept and (layer_recall := kept[layer].recall) is not None else 1.0
            for layer in layers
        ]
        assert row["layer_density"] == pytest.approx(density, abs=1e-4) and max(density[1:5]) < 0.9
        assert row["layer_recall"] == pytest.approx(recall, abs=1e-4)
        assert row["density"] == pytest.approx(sum(density) / len(density), abs=1e-4)
        assert row["recall"] == pytest.approx(sum(recall) / len(recall), abs=1e-4)
        assert row["timing"]["prefill_s"] > 0 and row["timing"]["dense_prefill_s"] > 0
        expected = {
            "kind": "fidelity", "model": MODEL_DIR.name, "model_sha256": model_sha256(MODEL_DIR), "dtype": "float32",
            "device": "cpu", "devices": 1, "length": LONGER, "skip": SKIP, "chunk": None, "selector": "flashprefill",
            "mean_correction": False, "torch": torch.__version__,
        }  # fmt: skip
        assert expected.items() <= row.items() and row["settings"]["alpha"] == 0.2
        assert {"gpu", "transformers", "triton", "commit", "python", "text_sha256", "tokenizer_sha256"} <= set(row)
    assert rows[0]["text_sha256"] == rows[2]["text_sha256"] != rows[1]["text_sha256"]
    assert rows[2]["kl"] < rows[0]["kl"] and rows[2]["density"] > rows[0]["density"]
    assert picture.read_bytes().startswith(b"\x89PNG")

    before = out.read_bytes()
    out.write_bytes(before + b'{"kind": "fide')  # a writer that was stopped
    again = fidelity(out, *specs, "--lengths", str(LONGER))
    assert again.exit_code == 0 and out.read_bytes() == before, "nothing is measured twice"
    assert "alpha=0.2" in again.stdout, "the table shows what was there"
    assert re.search(r"(\d+) of \1 rows were in \S+ already", again.stdout)


def test_without_a_selector(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert fidelity(out, "--no-recall", "--lengths", "1024").exit_code == 0
    assert [(row["selector"], row["settings"]) for row in read(out)] == [
        ("peakprefill", dataclasses.asdict(PeakPrefillConfig()))
    ] * 2
    assert all(row["density"] < 0.9 and row["kl"] > 1e-4 for row in read(out))


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    assert fidelity(whole, "--selector", SPEC, "--no-recall").exit_code == 0
    assert [row["recall"] for row in read(whole)] == [None, None] and read(whole)[0]["layer_recall"] == []
    measured = Fidelity._measured

    def interrupted(self: Fidelity, choice: Any, text: Any, *arguments: Any) -> Row:
        if text.name == "prose":
            raise KeyboardInterrupt
        return measured(self, choice, text, *arguments)

    monkeypatch.setattr(Fidelity, "_measured", interrupted)
    result = fidelity(out, "--selector", SPEC, "--no-recall")
    assert result.exit_code == 130
    assert f"stopped: 1 new rows are in {out}; the same command goes on from there" in result.stderr
    assert len(read(out)) == 1
    monkeypatch.undo()
    assert fidelity(out, "--selector", SPEC, "--no-recall").exit_code == 0
    assert but_timing(read(out)) == but_timing(read(whole))
    # Recall that was not measured before is, and the new row is the one that counts then.
    assert fidelity(out, "--selector", SPEC, "--recall").exit_code == 0
    rows = read(out)
    assert len(rows) == 4 and all(row["recall"] > 0.5 for row in rows[2:])
    assert [row["kl"] for row in rows[2:]] == [row["kl"] for row in rows[:2]]
    assert fidelity(out, "--selector", SPEC, "--no-recall").exit_code == 0 and len(read(out)) == 4


def test_memory_that_ends_during_a_run_keeps_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> Row:
        raise torch.OutOfMemoryError("out of memory: 3 GiB asked for\nmore")

    monkeypatch.setattr(Fidelity, "_measured", exhausted)
    result = fidelity(tmp_path / "rows.jsonl", "--selector", SPEC)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: out of memory: 3 GiB asked for (0 new rows are kept in")


def test_a_text_in_chunks(tmp_path: Path) -> None:
    """Chunks that a block does not divide, and a first one that is too short to be sparse."""
    out = tmp_path / "rows.jsonl"
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n" * 400)
    options = ("--selector", SPEC, "--text", str(text), "--recall")
    assert fidelity(out, *options).exit_code == 0
    assert fidelity(out, *options, "--chunk", "300").exit_code == 0
    assert fidelity(out, *options, "--chunk", str(LENGTH)).exit_code == 0
    whole, chunks, one = read(out)
    assert (whole["chunk"], chunks["chunk"], one["chunk"]) == (None, 300, LENGTH)
    assert whole["text"] == "text.txt" and whole["text_sha256"] == chunks["text_sha256"]
    assert one["kl"] == whole["kl"] and one["density"] == whole["density"] and one["recall"] == whole["recall"]
    assert whole["density"] < chunks["density"] < 1, "each chunk has a misaligned diagonal of two blocks"
    assert 0 < chunks["kl"] != whole["kl"] and 0.5 < chunks["recall"] < 1


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    out, one, two = tmp_path / "rows.jsonl", tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"
    for file, line in ((one, "def f(x):\n    return x + 1\n\n"), (two, "while True:\n    x = x * y\n")):
        file.parent.mkdir()
        file.write_text(line * 400)
    assert fidelity(out, "--selector", SPEC, "--no-recall", "--text", str(one), "--text", str(two)).exit_code == 0
    alone = tmp_path / "alone.jsonl"
    assert fidelity(alone, "--selector", SPEC, "--no-recall", "--text", str(two)).exit_code == 0
    first, second = but_timing(read(out))
    assert [second] == but_timing(read(alone)) and first["dense_loss"] != second["dense_loss"]


@needs.mean_correction
def test_everything_kept_is_dense(tmp_path: Path) -> None:
    """In bf16 too, and spread over devices, of which there is one here."""
    out = tmp_path / "rows.jsonl"
    everything = ("--selector", "flexprefill:gamma=1+min_budget=128", "--selector", "streaming_llm:window=4096")
    assert fidelity(out, *everything).exit_code == 0
    for row in read(out):
        assert row["density"] == 1 and row["recall"] == 1 and abs(row["kl"]) < 1e-8 and row["same_top"] == 1
    result = CliRunner().invoke(
        app,
        [
            *("fidelity", "--model", str(MODEL_DIR), "--out", str(out), "--lengths", str(LENGTH), "--skip", "128"),
            *("--dtype", "bfloat16", "--device-map", "auto", *everything[:2]),
        ],
    )
    assert result.exit_code == 0, result.output
    for row in read(out)[-2:]:
        assert row["dtype"] == "bfloat16" and row["density"] == 1 and 0 < row["kl"] < 0.01, "rounding"


def test_target_and_dense_layers_as_a_user_asks(tmp_path: Path, needle_model: PreTrainedModel) -> None:
    """The lines that are printed, pasted, give the KL that was printed."""
    out = tmp_path / "rows.jsonl"
    target = 0.005
    ask = ("--selector", f"flashprefill:{LITTLE}", "--target-kl", str(target), "--no-recall", "--lengths", str(LONGER))
    result = fidelity(out, *ask, "--json")
    assert result.exit_code == 0, result.output
    *rows, found = map(json.loads, result.stdout.splitlines())
    assert rows == read(out), "every setting that was tried is a row"
    assert found["kind"] == "fidelity_target" and found["target_kl"] == target and found["length"] == LONGER
    tried: dict[float, list[Row]] = {}
    for row in rows:
        tried.setdefault(row["settings"]["alpha"], []).append(row)
    assert 3 <= len(tried) <= 14 and all(len(texts) == 2 for texts in tried.values())
    alpha = found["settings"]["alpha"]
    assert found["kl"] == max(row["kl"] for row in tried[alpha]) and 0.9 * target < found["kl"] <= target
    within = [texts for texts in tried.values() if max(row["kl"] for row in texts) <= target]
    assert found["density"] == pytest.approx(
        min(sum(row["density"] for row in texts) / 2 for texts in within), abs=1e-4
    )
    assert found["vllm"].startswith(f"vllm serve {MODEL_DIR} --attention-backend CUSTOM")

    dense = [log_probabilities(needle_model, tokens(text, LONGER)) for text in (0, 1)]
    exec(found["python"], given := {"model": needle_model})
    from flexprefill_fa.integrations.transformers import SparsePrefill

    (handle,) = SparsePrefill.all_of(needle_model)
    try:
        sparse = [log_probabilities(needle_model, tokens(text, LONGER)) for text in (0, 1)]
    finally:
        handle.disable()
    assert "enable_sparse_prefill" in given
    kl = max(kl_of(p, q).mean().item() for p, q in zip(dense, sparse, strict=True))
    assert kl == pytest.approx(found["kl"], rel=0.01)

    known = len(read(out))
    again = fidelity(out, *ask)
    assert again.exit_code == 0 and len(read(out)) == known, "a search goes on where it was stopped"
    assert found["python"] in again.stdout and found["vllm"] in again.stdout

    selector = f"flashprefill:alpha={alpha}+{LITTLE}"
    layers = fidelity(
        out, "--selector", selector, "--dense-layers", "auto", "--no-recall", "--json", "--lengths", str(LONGER)
    )
    assert layers.exit_code == 0, layers.output
    advice = json.loads(layers.stdout.splitlines()[-1])
    assert advice["kind"] == "fidelity_layers" and sorted(advice["order"]) == list(range(6))
    assert set(advice["layer_kl"]) == set(map(str, range(6))) and min(advice["layer_kl"].values()) > 0
    assert advice["whole"]["kl"] == found["kl"] and advice["kl"] <= found["kl"]
    assert advice["tried"] and all(trial["density"] <= advice["whole"]["density"] for trial in advice["tried"])
    assert advice["order"][0] in advice["tried"][0]["dense_layers"]


def test_curves_are_one_for_each_selector_and_its_other_settings() -> None:
    def row(density: float, alpha: float, window: int = 1, correction: bool = False) -> Row:
        settings = {"alpha": alpha, "window_blocks": window}
        return {
            "selector": "flashprefill", "settings": settings, "density": density, "kl": 1 - density,
            "mean_correction": correction, "dense_layers": [],
        }  # fmt: skip

    rows = [row(0.5, 0.1), row(0.25, 0.2), row(1.0, 0.0), row(0.5, 0.1, window=4), row(0.5, 0.1, correction=True)]
    assert curves(rows) == {
        "flashprefill window_blocks=1": [(0.25, 0.75), (0.5, 0.5), (1.0, 1e-6)],
        "flashprefill": [(0.5, 0.5)],
        "flashprefill window_blocks=1, corrected": [(0.5, 0.5)],
    }, "4 is the usual window"
    assert list(curves(rows[:2])) == ["flashprefill"]
