"""What `flexprefill fidelity` refuses: in one line, and before a model is loaded where that can be known."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from flexprefill_fa.integrations import hf_attention
from flexprefill_fa.tools.cli import app
from flexprefill_fa.tools.fidelity import cli, memory
from flexprefill_fa.tools.fidelity.texts import CORPORA, read_tokens
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import read

CPU = torch.device("cpu")


def fidelity(out: Path, *arguments: str, model: Path = MODEL_DIR, stdin: str | None = None) -> Result:
    usual = ["--model", str(model), "--out", str(out), "--device", "cpu", "--lengths", "1100", "--dtype", "float32"]
    return CliRunner().invoke(app, ["fidelity", *usual, *arguments], input=stdin)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The needle model without its weights."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((MODEL_DIR / name).read_bytes())
    return copy


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a model is loaded."""

    def load(*arguments: Any) -> Any:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(cli, "load_model", load)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--lengths", "some"), ("whole numbers of tokens", "'some'")),
        (("--lengths", "4096,0"), ("whole numbers of tokens", "'0'")),
        (("--lengths", "513"), ("at least 514 tokens", "first 512", "got 513")),
        (("--lengths", "4096,600", "--skip", "599"), ("at least 601 tokens", "got 600")),
        (("--lengths", "1000000"), ("at most", "positions", "got 1000000")),
        (("--selector", "unknown"), ("unknown selector 'unknown'",)),
        (("--selector", "dense"), ("dense is what all others are compared with",)),
        (("--selector", "flashprefill:alpha=2"), ("alpha must be in", "2")),
        (("--selector", "flashprefill:gamma=0.5"), ("has no gamma",)),
        (("--dense-layers", "all"), ("auto or layer indices such as 0,4", "'all'")),
        (("--dense-layers", "1,"), ("auto or layer indices",)),
        (("--dense-layers", "1", "--selector", "flashprefill:dense_layers=0"), ("given twice",)),
        (("--target-kl", "0"), ("target-kl must be", "got 0")),
        (("--target-kl", "nan"), ("target-kl must be", "got nan")),
        (("--dtype", "int8"), ("dtype must be one of", "'int8'")),
        (("--device", "tpu"), ("device must be", "'tpu'")),
        (("--device-map", "auto"), ("without --device",)),
        (("--device", "auto", "--device-map", "cuda:0"), ("auto, balanced", "'cuda:0'")),
        (("--text", "nowhere.txt"), ("nowhere.txt", "No such file")),
        (("--plot", "nowhere/plot.png"), ("there is no folder nowhere",)),
        (("--model", "nowhere"), ("no model folder at nowhere",)),
    ],
)
def test_refused_before_loading(out: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(fidelity(out, *arguments), *parts)
    assert not out.exists()


@pytest.mark.usefixtures("unloaded")
def test_texts_that_are_too_short(out: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("word " * 200)
    for arguments, stdin in ((("--text", str(short)), None), (("--text", "-"), "word " * 200)):
        result = fidelity(out, *arguments, stdin=stdin)
        assert_refused(result, "must have at least 1100 tokens, the longest of --lengths, got", arguments[1])
    (tmp_path / "empty.txt").write_text(" \n")
    assert_refused(fidelity(out, "--text", str(tmp_path / "empty.txt")), "is empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert_refused(fidelity(out, "--text", str(tmp_path / "binary")), "not UTF-8")


@pytest.mark.usefixtures("unloaded")
def test_folders_that_lack_something(out: Path, folder: Path) -> None:
    assert_refused(fidelity(out, model=folder), "the folder has no weights (such as model.safetensors)")
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"not a header at all")
    assert_refused(fidelity(out, model=folder), "model.safetensors is not a file of safetensors")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert_refused(fidelity(out, model=folder), "has no tokenizer (such as tokenizer.json)")
    (folder / "config.json").unlink()
    assert_refused(fidelity(out, model=folder), "has no config.json")


@pytest.mark.usefixtures("unloaded")
def test_too_little_memory_is_said_in_bytes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device, spread: 123_456_789)
    result = fidelity(out)
    assert_refused(result, "too little memory on cpu: at least", "(24,130,560 bytes)", "(123,456,789 bytes) are free")


@pytest.mark.usefixtures("unloaded")
def test_a_plot_needs_matplotlib(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return whole(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(fidelity(out, "--plot", str(tmp_path / "plot.png")), "--plot needs matplotlib: pip install")


def test_layers_that_the_model_does_not_have(out: Path) -> None:
    result = fidelity(out, "--dense-layers", "6")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert "0 to 5" in result.stderr and "layer 6" in result.stderr
    result = fidelity(out, "--dense-layers", "0,1,2,3,4,5")
    assert result.exit_code == 2 and "no layer of this model can run sparse" in result.stderr
    assert not out.exists()


def test_nan_logits_of_the_dense_model(out: Path, folder: Path) -> None:
    weights = load_file(MODEL_DIR / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = fidelity(out, "--selector", "flashprefill", model=folder)
    assert result.exit_code == 2 and not out.exists()
    last = result.stderr.splitlines()[-1]
    assert last == (
        "error: the dense model gives NaN at position 512 of the text source in float32: try another --dtype"
    )


def test_nan_logits_of_one_selector_leave_the_others(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hf_attention.attend

    def broken(query: Any, key: Any, value: Any, selector: Any, *more: Any, **named: Any) -> Any:
        result, *rest = whole(query, key, value, selector, *more, **named)
        if selector is not None and selector.name == "flashprefill":
            result[:, :, 640] = float("nan")
        return result, *rest

    monkeypatch.setattr(hf_attention, "attend", broken)
    specs = ("--selector", "flashprefill:window_blocks=1", "--selector", "streaming_llm:window=256", "--no-recall")
    result = fidelity(out, *specs, "--json")
    assert result.exit_code == 2, result.output
    assert [row["selector"] for row in read(out)] == ["streaming_llm"] * 2
    assert [json.loads(line)["selector"] for line in result.stdout.splitlines()] == ["streaming_llm"] * 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: flashprefill gives NaN at position 640 of the text source in float32, 1100 tokens; dense does not"
    ]


def test_a_target_that_no_setting_reaches(out: Path) -> None:
    """Two columns and diagonals of at most 384 tokens leave something out, whatever gamma is."""
    spec, target = "flexprefill:max_budget=384+min_budget=128", ("--target-kl", "1e-7", "--no-recall")
    result = fidelity(out, "--selector", spec, *target, "--text", __file__, "--skip", "64", "--lengths", "700")
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    row = min(read(out), key=lambda row: row["kl"])
    assert last.startswith("error: no setting of flexprefill stays within a KL of 1e-07 at 700 tokens: the best that")
    assert f"gamma={row['settings']['gamma']}" in last and f"KL {row['kl']:.4g} at density {row['density']:.3f}" in last
    assert row["kl"] > 1e-7 and "enable_sparse_prefill" not in result.stdout
    result = fidelity(out, "--selector", "flexprefill", *target, "--text", __file__, "--dtype", "bfloat16")
    assert "what is left there may be rounding: try --dtype float32" in result.stderr.splitlines()[-1], "all is kept"


def test_weight_bytes_are_those_of_the_loaded_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    bytes_of_model = sum(each.numel() * each.element_size() for each in model.parameters())
    assert memory.weight_bytes(MODEL_DIR, torch.float32) == bytes_of_model
    assert memory.weight_bytes(MODEL_DIR, torch.bfloat16) == bytes_of_model / 2
    assert memory.weight_bytes(MODEL_DIR, None) == bytes_of_model / 2, "it is stored in bf16"
    parts = {"a.safetensors": ["x"], "b.safetensors": ["y", "z"]}
    for name, keys in parts.items():
        save_file({key: torch.zeros(3, 5, dtype=torch.bfloat16) for key in keys}, folder / name)
    assert memory.weight_bytes(folder, None) == 90 and memory.weight_bytes(folder, torch.float32) == 180
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"y": "b.safetensors", "z": "b.safetensors"}}))
    assert memory.weight_bytes(folder, None) == 60, "the other file holds the same weights under other names"
    index.write_text("[]")
    with pytest.raises(UsageError, match="is not an index of weights"):
        memory.weight_bytes(folder, None)
    for file in (index, *map(folder.joinpath, parts)):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert memory.weight_bytes(folder, None) == pytest.approx(bytes_of_model, rel=0.01)


def test_the_estimate_grows_with_what_is_asked() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    small = memory.estimate(MODEL_DIR, config, torch.float32, CPU, 4096, 1)
    assert memory.estimate(MODEL_DIR, config, torch.float32, CPU, 8192, 1).activations > 2 * small.activations - 1
    more_text = memory.estimate(MODEL_DIR, config, torch.float32, CPU, 4096, 3)
    assert more_text.activations - small.activations == 2 * 4096 * config.hidden_size * 4
    assert small.total == small.weights + max(small.activations, small.logits)
    chunked = memory.estimate(MODEL_DIR, config, torch.float32, CPU, 4096, 1, chunk=512)
    assert chunked.activations < small.activations and chunked.weights == small.weights
    small.check(small.total, "cpu")
    with pytest.raises(UsageError, match=f"{small.total:,} bytes"):
        small.check(small.total - 1, "cpu")
    assert 0 < memory.free_bytes(CPU) < 2**50


def test_texts_begin_alike_at_every_length() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    long, short = read_tokens(tokenizer, (), 5000), read_tokens(tokenizer, (), 1000)
    for one, other in zip(long, short, strict=True):
        assert len(one.ids) == 5000 and one.first(1000) == other.first(1000)
        assert one.sha256(1000) == other.sha256(1000) != one.sha256(1001)
    source, prose = (tokenizer.decode(each.first(1000)) for each in long)
    assert [each.name for each in long] == list(CORPORA) == ["source", "prose"]
    assert "self" in source and "return" in source and prose.startswith('The "assert" statement')
    assert all(CORPORA[name]().isascii() and len(CORPORA[name]()) > 400_000 for name in CORPORA)


def test_words_of_many_characters_are_read_on(tmp_path: Path) -> None:
    """A text of which eight characters a token are too few."""

    def tokenize(text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text) // 40))}

    file = tmp_path / "text.txt"
    file.write_text("x" * 4400)
    (found,) = read_tokens(tokenize, (str(file),), 100)
    assert found.ids == list(range(100)) and found.name == "text.txt"
    with pytest.raises(UsageError, match="at least 111 tokens, the longest of --lengths, got 110"):
        read_tokens(tokenize, (str(file),), 111)
