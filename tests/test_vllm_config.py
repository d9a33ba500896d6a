"""The vLLM backend's settings: where they come from, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexprefill_fa import FlashPrefillConfig, FlexPrefillConfig, PeakPrefillConfig, StreamingLLMConfig
from flexprefill_fa.integrations.engine_settings import SECTION, Settings
from flexprefill_fa.integrations.vllm_config import VARIABLE, longest_chunk, read_settings

ROOT = Path(__file__).resolve().parent.parent


def test_defaults() -> None:
    assert read_settings({}, {}) == Settings()
    assert read_settings(None, {}) == Settings()
    assert read_settings({"somebody_elses": 1}, {}) == Settings()
    assert Settings().selector == PeakPrefillConfig()
    assert read_settings({SECTION: {"peak": 0.1, "min_prefill_tokens": 512}}, {}).selector == PeakPrefillConfig(0.1)


def test_settings_of_flexprefill_without_a_name_are_still_its_own() -> None:
    assert read_settings({SECTION: {"gamma": 0.9, "backend": "TRITON"}}, {}).selector == FlexPrefillConfig(gamma=0.9)
    with pytest.raises(ValueError, match=r"unknown setting 'gamma', expected one of .*peak"):
        read_settings({SECTION: {"selector": "peakprefill", "gamma": 0.9}}, {})


def test_additional_config_counts_before_the_environment() -> None:
    environment = {VARIABLE: json.dumps({"gamma": 0.5})}
    found = read_settings({SECTION: {"selector": "flashprefill", "alpha": 0.2, "backend": "TRITON"}}, environment)
    assert found.selector == FlashPrefillConfig(alpha=0.2) and found.backend == "TRITON"
    line = found.describe("TRITON")
    assert "additional_config" in line and "alpha 0.2" in line and "kernel TRITON" in line


def test_the_environment() -> None:
    found = read_settings({}, {VARIABLE: '{"gamma": 0.5, "min_prefill_tokens": 512, "log_seconds": 0}'})
    assert (found.selector, found.min_prefill_tokens) == (FlexPrefillConfig(gamma=0.5), 512)
    assert VARIABLE in found.source and found.log_seconds == 0


def test_prompts_of_which_everything_is_kept_stay_dense() -> None:
    given = {"selector": "streaming_llm", "sink": 128, "window": 20000}
    assert read_settings({SECTION: given}, {}).min_prompt_tokens == 20129
    found = read_settings({SECTION: {**given, "min_prompt_tokens": 5}}, {})
    assert found.min_prompt_tokens == 5 and found.selector == StreamingLLMConfig(sink=128, window=20000)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peek": 0.9}, r"additional_config\['sparse_prefill'\]: unknown setting 'peek', expected one of .*peak"),
        (
            {"gamma": 0.9, "gama": 0.9},
            "unknown setting 'gama', expected one of .*gamma.* the selector flexprefill",
        ),
        (
            {"alpha": 0.1},
            "'alpha': not of peakprefill, .*, but of flashprefill: name it, as in .*flashprefill",
        ),
        ({"stride": 8, "threshold": 0.9}, "'stride', 'threshold': not of peakprefill, .* but of xattention: name it"),
        ({"peak": 0.2, "alpha": 0.1}, "no selector has all of these settings: 'peak' is one of .*, 'alpha' is one of"),
        ({"selector": "flash"}, "unknown selector 'flash', expected one of cosa, flashprefill"),
        ({"gamma": 1.5}, r"gamma must be in \(0, 1\], got 1.5"),
        ({"gamma": "0.9"}, "gamma must be a number, got str"),
        ({"backend": "CPU"}, "backend must be one of auto, TRITON, FLASH, got 'CPU'"),
        ({"min_prefill_tokens": 64}, "min_prefill_tokens must be at least 128, got 64"),
        ({"min_prompt_tokens": 0}, "min_prompt_tokens must be at least 1, got 0"),
        ({"log_seconds": -1}, "log_seconds must be at least 0, got -1"),
        ([1], "must be an object of settings, got list"),
        ({"selector": ["a"]}, r"selector must be a name, got list \['a'\]"),
    ],
)
def test_bad_settings(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings({SECTION: given}, {})


@pytest.mark.parametrize("name", ["sparse_prefil", "sparse-prefill", "SPARSE_PREFILL", "gamma", "window", "selector"])
def test_settings_in_the_wrong_place(name: str) -> None:
    """Otherwise the engine would run with its defaults, and nobody would know."""
    for beside in ({}, {SECTION: {}}):
        with pytest.raises(
            ValueError, match=rf"additional_config\['{name}'\] is no setting: .* under 'sparse_prefill'"
        ):
            read_settings({**beside, name: {"gamma": 0.5}}, {})
    assert read_settings({"gdn_prefill_backend": "triton", "prefill": 1}, {}) == Settings()


@pytest.mark.parametrize(
    ("changes", "chunk", "least"),
    [
        ({}, 7168, 2048),
        ({"max_num_batched_tokens": 2048, "max_num_seqs": 256}, 1792, 896),
        ({"max_num_batched_tokens": 2048}, 1024, 512),
        ({"max_num_batched_tokens": 1024}, 1, 128),
        ({"long_prefill_token_threshold": 1500}, 1500, 750),
        ({"max_num_scheduled_tokens": 3024}, 2000, 1000),
    ],
)
def test_the_default_fits_the_chunks_of_the_engine(changes: dict[str, int], chunk: int, least: int) -> None:
    scheduler = {
        "max_num_batched_tokens": 8192,
        "max_num_scheduled_tokens": None,
        "max_num_seqs": 1024,
        "long_prefill_token_threshold": 0,
    }
    assert longest_chunk(SimpleNamespace(**{**scheduler, **changes})) == chunk
    assert read_settings({}, {}, chunk).min_prefill_tokens == least
    assert read_settings({SECTION: {"min_prefill_tokens": 3000}}, {}, chunk).min_prefill_tokens == 3000


def test_a_bad_environment() -> None:
    with pytest.raises(ValueError, match=f"environment variable {VARIABLE} is not JSON"):
        read_settings({}, {VARIABLE: "gamma=0.9"})
    with pytest.raises(ValueError, match=f"environment variable {VARIABLE}: unknown setting 'x'"):
        read_settings({}, {VARIABLE: '{"x": 1}'})


def test_the_entry_point_and_the_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    entry = (
        '[project.entry-points."vllm.general_plugins"]\nflexprefill_fa = "flexprefill_fa.integrations.vllm:register"\n'
    )
    assert entry in project
    assert 'vllm = ["vllm>=0.24"]\n' in project
