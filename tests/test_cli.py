"""The command line: `generate`, and one helpful line for every mistake."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result

from flexprefill_fa import __version__
from flexprefill_fa.choice import ChoiceError, make_config
from flexprefill_fa.tools.cli import app
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import build_prompt

# Long enough to run sparse with a min_budget of 128 tokens, short enough for a CPU.
PROMPT_TOKENS = 1100
SPARSE = ("--min-budget", "128", "--dtype", "float32", "--device", "cpu")


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A needle prompt as text; the tokens of its text may differ from the prompt's where source was cut."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    prompt = build_prompt(tokenizer, PROMPT_TOKENS, needles=2)
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(tokenizer.decode(prompt.token_ids), encoding="utf-8")
    path.with_suffix(".answer").write_text(prompt.answer)
    return path


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models of one layer: one with room for 64 positions, one with a sliding window."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0}
    models = {
        "short": LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=64)),
        "window": MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=256)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder / name)
    return {name: folder / name for name in models}


def generate(prompt: Path | str, *options: str, model: Path | str = MODEL_DIR, stdin: bytes | None = None) -> Result:
    return run("generate", "--model", str(model), "--prompt-file", str(prompt), *options, stdin=stdin)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"flexprefill {__version__}\n"


def test_generate_json_compares_sparse_with_dense(prompt_file: Path) -> None:
    result = generate(
        prompt_file, *SPARSE, "--gamma", "0.9", "--max-new-tokens", "7", "--compare", "dense", "--recall", "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    answer = prompt_file.with_suffix(".answer").read_text()
    assert report["sparse"]["text"] == report["dense"]["text"] == answer
    assert report["same_tokens"] is True
    assert (report["selector"], report["gamma"], report["min_budget"]) == ("flexprefill", 0.9, 128)
    assert report["max_budget"] is None
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    assert abs(report["prompt"]["tokens"] - PROMPT_TOKENS) < 20
    sparse = report["sparse"]
    assert 0 < sparse["density"] < 0.95
    assert [layer["layer"] for layer in sparse["layers"]] == list(range(6))
    assert all(0.2 < layer["lowest_recall"] <= layer["recall"] <= 1 for layer in sparse["layers"])
    assert report["speedup"] == pytest.approx(report["dense"]["prefill_seconds"] / sparse["prefill_seconds"])
    assert "density" not in report["dense"]


def test_generate_prints_the_text_alone_on_stdout(prompt_file: Path) -> None:
    text = prompt_file.read_bytes()
    result = generate("-", *SPARSE, "--max-new-tokens", "7", "--variant", "paper", stdin=text)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == prompt_file.with_suffix(".answer").read_text()
    for word in ("sparse", "density", "seconds", "recall"):
        assert word in result.stderr


def test_short_prompt_runs_dense_and_says_so(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def f(x):\n    return x\n")
    result = generate(file, "--device", "cpu", "--max-new-tokens", "2", model=tiny_models["short"])
    assert result.exit_code == 0, result.output
    assert "Every block was kept: prompts of up to 384 tokens run dense" in result.stderr
    assert "warning" not in result.stderr


def test_prompt_beyond_the_models_positions_warns(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("x = 1\n" * 40)
    result = generate(file, "--device", "cpu", "--max-new-tokens", "2", "--json", model=tiny_models["short"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sparse"]["density"] is None
    assert "warning: prompt and answer take up to" in result.stderr
    assert "made for 64" in result.stderr


def test_unreadable_prompt_files(tmp_path: Path) -> None:
    assert_one_line_error(generate(tmp_path / "missing.txt"), "missing.txt", "No such file")
    assert_one_line_error(generate(tmp_path), str(tmp_path), "Is a directory")
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    assert_one_line_error(generate(empty), "empty.txt is empty")
    latin.write_bytes(b"caf\xe9 au lait")
    assert_one_line_error(generate(latin), "latin.txt is not UTF-8 text: byte 0xe9 at offset 3")
    assert_one_line_error(generate("-", stdin=b""), "standard input is empty")


def test_prompt_file_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert_one_line_error(generate("secret.txt"), "cannot read the prompt file secret.txt: Permission denied")


def test_prompt_without_tokens(prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__call__", lambda *_: {"input_ids": []})
    assert_one_line_error(generate(prompt_file), "finds no tokens in the prompt")


def test_unusable_model_folders(prompt_file: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    def with_model(folder: Path) -> Result:
        return generate(prompt_file, "--device", "cpu", model=folder)

    assert_one_line_error(with_model(tmp_path / "missing"), "no model folder at", "missing")
    assert_one_line_error(with_model(prompt_file), "no model folder at", "prompt.txt")
    assert_one_line_error(with_model(tmp_path), "has no config.json")
    (tmp_path / "config.json").write_text("{}")
    assert_one_line_error(with_model(tmp_path), "has no tokenizer")
    (tmp_path / "tokenizer.json").write_text("not a tokenizer")
    assert_one_line_error(with_model(tmp_path), "cannot load the tokenizer in")
    for file in tiny_models["short"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert_one_line_error(with_model(tmp_path), "cannot load the model in")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert_one_line_error(with_model(tmp_path), "cannot load the model in")


def test_model_that_the_integration_refuses(prompt_file: Path, tiny_models: dict[str, Path]) -> None:
    result = generate(prompt_file, *SPARSE, model=tiny_models["window"])
    assert_one_line_error(result, "sliding")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--selector", "nonsense"), "unknown selector 'nonsense', expected one of cosa, flashprefill, flexprefill"),
        (("--selector", ""), "unknown selector ''"),
        (("--selector", "flashprefill:alpha=2"), "alpha must be in (0, 1], got 2"),
        (("--selector", "flashprefill:gamma=0.9"), "selector flashprefill has no gamma"),
        (("--selector", "flexprefill:gamma"), "must have the form name:field=value+field=value"),
        (("--selector", "flexprefill:gamma=0.9", "--gamma", "0.8"), "gamma is given twice"),
        (("--gamma", "1.5"), "gamma must be in (0, 1], got 1.5"),
        (("--gamma", "nan"), "gamma must be in (0, 1], got nan"),
        (("--tau", "-1"), "tau must be in [0, 1], got -1"),
        (("--min-budget", "0"), "min_budget must be at least 1, got 0"),
        (("--max-budget", "100"), "max_budget must be at least"),
        (("--block-size", "100"), "block_size must be one of"),
        (("--variant", "best"), "variant must be one of"),
        (("--compare", "nothing"), "compare must be dense, got 'nothing'"),
        (("--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--device", "meta"), "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_wrong_flag_values(options: tuple[str, str], message: str) -> None:
    assert_one_line_error(generate("-", *options, stdin=b"text"), message)


@pytest.mark.parametrize("arguments", [("--max-new-tokens", "0"), ("--gamma", "much"), ("--nonsense",)])
def test_flags_that_do_not_parse(arguments: tuple[str, ...]) -> None:
    result = generate("-", *arguments, stdin=b"text")
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.output


def test_option_that_the_selector_lacks() -> None:
    with pytest.raises(ChoiceError, match="selector flexprefill has no alpha, only gamma, tau"):
        make_config("flexprefill", alpha=0.1)


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line_error(generate("-", "--device", "cuda", stdin=b"text"), "device cuda", "finds no CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert_one_line_error(generate("-", "--device", "cuda:2", stdin=b"text"), "device cuda:2", "only 2 GPUs")


@pytest.mark.parametrize(
    "command",
    [
        ("demo",),
        ("generate", "--model", "m", "--prompt-file", "p"),
        ("inspect", "--model", "m", "--prompt-file", "p", "--out", "o"),
    ],
)
def test_cpu_kernels_that_cannot_be_built(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_one_line_error(run(*command, "--device", "cpu"), "C++ compiler", "no-such-compiler is not here")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert_one_line_error(run(*command, "--device", "cpu"), "needs AVX2, and torch finds DEFAULT")


def test_missing_transformers_names_the_extra(prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = generate(prompt_file, "--device", "cpu")
    assert_one_line_error(result, "needs Hugging Face transformers", "pip install 'flexprefill-fa[hf]'")
    assert_one_line_error(run("demo", "--device", "cpu"), "pip install 'flexprefill-fa[hf]'")


def test_running_out_of_gpu_memory_is_one_line(prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("flexprefill_fa.tools.generation.measure_sparse", full)
    assert_one_line_error(generate(prompt_file, "--device", "cpu"), "CUDA out of memory.")
