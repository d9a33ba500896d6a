"""The demo on a short prompt: both answers right, sparse prefill really sparse, and honest exit codes."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from flexprefill_fa import PeakPrefillConfig
from flexprefill_fa.masks import DEFAULT_SELECTOR
from flexprefill_fa.tools.cli import app
from flexprefill_fa.tools.demo import Answer, DemoResult
from flexprefill_fa.tools.generation import LayerReport, Measurement
from flexprefill_fa.tools.progress import WorkProgress

SMALL = ("demo", "--tokens", "1024", "--needles", "4", "--device", "cpu")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {"selector": DEFAULT_SELECTOR} | dataclasses.asdict(PeakPrefillConfig())),
        (("--gamma", "0.9", "--min-budget", "128"), {"selector": "flexprefill", "gamma": 0.9, "min_budget": 128}),
        (("--selector", "flashprefill:alpha=0.2+window_blocks=1"), {"selector": "flashprefill", "alpha": 0.2}),
    ],
)
def test_json_report(options: tuple[str, ...], settings: dict[str, Any]) -> None:
    result = run(*SMALL, *options, "--repeats", "1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["prompt"] | {"tokens": 1024, "needles": 4, "seed": 0} == report["prompt"]
    for name in ("dense", "sparse"):
        assert report[name]["correct"] is True
        assert report[name]["answer"] == report["prompt"]["answer"]
        assert report[name]["prefill_seconds"] > 0
    sparse = report["sparse"]
    assert sparse["compile_seconds"] >= 0
    assert 0 < sparse["density"] < 0.95
    assert len(sparse["layers"]) == 6
    assert all(0.5 < layer["recall"] <= 1 for layer in sparse["layers"])
    assert report["dtype"] == "float32"
    assert settings.items() <= report.items()


def test_a_model_that_is_refused_is_the_users_mistake() -> None:
    pytest.importorskip("transformers")
    from flexprefill_fa.tools.generation import usual_correction
    from flexprefill_fa.tools.loading import UsageError

    with pytest.raises(UsageError, match="Linear"):
        usual_correction(torch.nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Run `flexprefill demo` with a made-up result whose sparse answer is given."""

    def invoke(sparse_text: str) -> Result:
        layers = tuple(LayerReport(layer, 0.1 * layer, 0.9, 0.8) for layer in range(3))
        dense = Answer("0123456", True, Measurement([1, 2], 3.0))
        sparse = Answer(sparse_text, sparse_text == "0123456", Measurement([1, 2], 1.5, 7.25, layers))
        result = DemoResult("#word", "0123456", torch.float32, dense, sparse, False)
        monkeypatch.setattr("flexprefill_fa.tools.demo.run_demo", lambda *_, **__: result)
        return run("demo", "--device", "cpu")

    return invoke


def test_tables(canned: Callable[[str], Result]) -> None:
    result = canned("0123456")
    assert result.exit_code == 0, result.output
    rows = {row.split()[1]: row.split() for row in result.stdout.splitlines() if row.startswith("│")}
    assert [cell for cell in rows["dense"] if cell != "│"] == ["dense", "0123456", "right", "3.00", "-", "-", "1.00x"]
    assert [cell for cell in rows["sparse"] if cell != "│"] == [
        "sparse",
        "0123456",
        "right",
        "1.50",
        "7.2",
        "0.100",
        "2.00x",
    ]
    assert [cell for cell in rows["2"] if cell != "│"] == ["2", "0.200", "0.900", "0.800"]
    assert result.stderr == ""


def test_exit_code_1_when_an_answer_is_wrong(canned: Callable[[str], Result]) -> None:
    result = canned("123")
    assert result.exit_code == 1
    assert "123 wrong" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "50"), "tokens must be at least"),
        (("--needles", "0"), "needles must be at least 1, got 0"),
        (("--gamma", "0"), "gamma must be in (0, 1], got 0"),
        (("--selector", "peakprefill:peak=1"), "peak must be in (0, 1), got 1"),
        (("--selector", "peakprefill", "--gamma", "0.9"), "selector peakprefill has no gamma, only peak"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_wrong_flag_values(options: tuple[str, str], message: str) -> None:
    result = run("demo", "--device", "cpu", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_progress_bar_only_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress(Console(stderr=True, force_terminal=False)).task("working", 2) as advance:
        assert advance is None
    assert capsys.readouterr().err == ""
    with WorkProgress(Console(stderr=True, force_terminal=True)).task("working", 2) as advance:
        assert advance is not None
        advance()
    captured = capsys.readouterr()
    assert "working" in captured.err and captured.out == ""
