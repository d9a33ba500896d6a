"""Queries, keys and values of trained models: of the needle model, and of any folder by `--workload model`."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli_checks import assert_refused
from hf_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import bench.capture
from bench.capture import capture_layers, needle_layers
from bench.cli import app
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import build_prompt

FAST = ("--device", "cpu", "--dtype", "float32", "--repeats", "2", "--seconds", "0.1")


def test_needle_capture_is_what_the_layer_computes(needle_model, needle_tokenizer) -> None:
    """Attention of the captured tensors equals the layer's, for which the model is run whole."""
    query, key, value = needle_layers(600, [1], dtype=torch.float32, device=torch.device("cpu"), seed=3)[1]
    assert query.shape == (1, 8, 600, 64) and key.shape == value.shape == (1, 2, 600, 64)
    seen = []
    hook = needle_model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        needle_model(torch.tensor([build_prompt(needle_tokenizer, 600, needles=8, seed=3).token_ids]))
    hook.remove()
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), seen[0], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2 layers, 4 query and 2 key heads of 32, with the needle model's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["attention", "--workload", "model", "--model", str(folder), *FAST, *options])


def test_a_models_layer_is_measured_on_a_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ("--selectors", "flexprefill:min_budget=128+gamma=0.5", "--layer", "1", "--text", "prose")
    result = run(folder, "--lengths", "520", *options, "--backends", "CPU", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "model heads**" in result.stdout and "tiny, SHA-256 " in result.stdout
    assert ", prose, layer 1, " in result.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["path"] for row in rows] == ["dense", "dense", "sparse"]
    said = {"workload": "model", "model": "tiny", "model_sha256": model_sha256(folder), "layer": 1, "text": "prose"}
    for row in rows:
        assert row | said == row and len(row["text_sha256"]) == 64 and "error" not in row
        assert (row["length"], row["heads"], row["kv_heads"], row["head_dim"]) == (520, 4, 2, 32)
    assert rows[-1]["density"] < 1 and rows[-1]["check_error"] <= rows[-1]["check_allowed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "2"), "layer must be in [0, 2), got 2"),
        (("--layer", "1", "--kv-heads", "4"), "the model has 4 heads, 2 kv-heads and head-dim 32: leave those options"),
        (("--text", "poetry"), "text must be one of source, prose, got 'poetry'"),
        (("--workload", "needle"), "--workload model and --model FOLDER go together, got needle and"),
        (("--model", "nowhere"), "no model folder at nowhere"),
    ],
)
def test_what_does_not_fit_the_model_is_told_in_one_line(options: tuple[str, ...], message: str, folder: Path) -> None:
    assert_refused(run(folder, "--lengths", "256", *options), message)


def test_a_text_that_is_too_short_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.capture.CORPORA, "source", lambda: "def short(): pass")
    result = run(folder, "--layer", "0", "--lengths", "256", "--out", str(tmp_path / "rows.jsonl"))
    assert result.exit_code == 2
    assert "the text source must have at least 256 tokens, the longest of --lengths, got " in result.stderr


def test_another_scale_is_in_the_queries(folder: Path) -> None:
    """Attention at the usual scale over what is captured is the model's own."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.3
    seen = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    query, key, value = capture_layers(model, range(40), [1])[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), seen[0], atol=1e-4, rtol=1e-4)
