"""The leaderboard of `flexprefill fidelity`'s rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.fidelity_tables import LEADERBOARD, SINGLES, density_at, fidelity_summary
from bench.render import draw_plots
from flexprefill_fa import FlashPrefillConfig, FlexPrefillConfig, XAttentionConfig


def row(config: Any, density: float, kl: float, **fields: Any) -> dict[str, Any]:
    conditions = {
        "kind": "fidelity", "model": "some-model", "model_sha256": "0123456789abcdef", "text": "source", "skip": 512,
        "dtype": "bfloat16", "device": "cuda", "gpu": "A GPU", "chunk": None, "length": 4096, "dense_layers": [],
        "mean_correction": False, "torch": "2.11", "transformers": "5.17", "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return {**conditions, "selector": config.name, "settings": settings, "density": density, "kl": kl, **fields}


def test_densities_are_read_between_settings() -> None:
    points = [(0.1, 0.4), (0.2, 0.1), (0.4, 0.025)]
    assert density_at(points, 0.1) == pytest.approx(0.2)
    assert density_at(points, 0.2) == pytest.approx(0.1 * 2**0.5)
    assert density_at(points, 0.05) == pytest.approx(0.2 * 2**0.5)
    assert density_at(points, 0.5) is None and density_at(points, 0.02) is None and density_at([], 0.1) is None


def test_a_table_for_each_model_and_text() -> None:
    rows = [row(FlashPrefillConfig(alpha), 0.05 / alpha, alpha) for alpha in (0.2, 0.1, 0.05)]
    rows += [row(XAttentionConfig(share), share / 4, 0.1 - share / 10) for share in (0.5, 0.8, 0.95)]
    rows += [row(XAttentionConfig(0.8), 0.2, 0.0201)]  # measured again: the later one counts
    rows += [row(XAttentionConfig(0.8), 0.2, 9.0, dense_layers=[1])]
    rows += [row(XAttentionConfig(share), share / 4, 0.05, text="prose") for share in (0.5, 0.8, 0.95)]
    source, prose = LEADERBOARD.markdown(rows).split("**some-model**")[1:]
    lines = [line for line in source.splitlines() if line.startswith("|")]
    assert lines[0] == "| selector | 4,096: KL 0.1 | 4,096: KL 0.03 | 4,096: KL 0.01 |"
    assert lines[2] == "| flashprefill | **0.500** | - | - |"
    assert lines[3].startswith("| xattention | - | **0.16") and lines[3].endswith(" | **0.218** |")
    assert "text 'prose'" in prose and "commit abc" in source


def sweep(config: type, knobs: list[float], densities: list[float], kls: list[float], **fields: Any) -> list[Any]:
    settings = zip(knobs, densities, kls, strict=True)
    return [row(config(knob), density, kl, same_top=1 - kl, kl_99=9 * kl, **fields) for knob, density, kl in settings]


def rows_of_three() -> list[dict[str, Any]]:
    flex = sweep(FlexPrefillConfig, [0.8, 0.95, 0.99], [0.2, 0.3, 0.4], [0.4, 0.2, 0.1])
    flash = sweep(FlashPrefillConfig, [0.3, 0.1, 0.05], [0.1, 0.2, 0.4], [0.2, 0.1, 0.02])
    return flex + flash + sweep(XAttentionConfig, [0.5, 0.9, 0.95], [0.1, 0.25, 0.3], [0.3, 0.05, 0.03])


def test_mean_correction_is_a_line_of_its_own() -> None:
    plain = sweep(FlashPrefillConfig, [0.3, 0.1, 0.05], [0.1, 0.2, 0.4], [0.2, 0.1, 0.05])
    corrected = sweep(FlashPrefillConfig, [0.3, 0.1, 0.05], [0.1, 0.2, 0.4], [0.1, 0.05, 0.01], mean_correction=True)
    cells = [line.split(" | ") for line in LEADERBOARD.markdown(plain + corrected).splitlines()]
    found = {cell[0]: cell[1:4] for cell in cells if cell[0].startswith("| flash")}
    assert found["| flashprefill"][0] == "0.200" and found["| flashprefill, corrected"][0] == "**0.100**"
    assert found["| flashprefill"][2] == "- |" and found["| flashprefill, corrected"][2] == "**0.400** |"


def test_a_summary_has_a_line_for_each_selector() -> None:
    text = fidelity_summary(rows_of_three())
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| flexprefill", "in 1, 2.3x", "in none", "in none"],
        ["| flashprefill", "in 1, 1.1x", "in 1, 1.1x", "in none"],
        ["| xattention", "in 1, 1.0x", "in 1, 1.0x", "in none"],
    ]
    assert lines[0].endswith("| 0.300: KL 0.200, 80.0% the same |")
    assert "1 sweeps (some-model, length 4096, source)" in text
    assert fidelity_summary([]) == ""


def test_a_few_settings_are_no_sweep() -> None:
    few = rows_of_three()[1:2]
    assert LEADERBOARD.markdown(few) == "" and SINGLES.markdown(rows_of_three()) == ""
    line = SINGLES.markdown(few).splitlines()[-1]
    assert line.startswith("| 4,096 | flexprefill | ") and line.endswith(" | 0.300 | 0.200 | 1.80 | 0.800 |")


def test_the_plot_needs_a_sweep_on_source_code(tmp_path: Path) -> None:
    rows = tmp_path / "fidelity.jsonl"
    for text, drawn in (("prose", False), ("source", True)):
        rows.write_text("".join(json.dumps({**one, "text": text}) + "\n" for one in rows_of_three()))
        draw_plots(tmp_path)
        assert (tmp_path / "fidelity.png").exists() is drawn
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
