"""The leaderboard of `flexprefill fidelity`'s rows."""

from __future__ import annotations

from typing import Any

import pytest

from bench.fidelity_tables import density_at, leaderboards
from flexprefill_fa import FlashPrefillConfig, XAttentionConfig


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
    rows += [row(XAttentionConfig(0.8), 0.3, 0.03, text="prose")]
    source, prose = leaderboards(rows).split("**some-model**")[1:]
    lines = [line for line in source.splitlines() if line.startswith("|")]
    assert lines[0] == "| selector | 4,096: KL 0.1 | 4,096: KL 0.03 | 4,096: KL 0.01 |"
    assert lines[2] == "| flashprefill | **0.500** | - | - |"
    assert lines[3].startswith("| xattention | - | **0.16") and lines[3].endswith(" | **0.218** |")
    assert "text 'prose'" in prose and "commit abc" in source
