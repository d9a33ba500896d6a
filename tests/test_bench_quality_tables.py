"""Rows of `python -m bench quality` as tables."""

from typing import Any

import pytest

from bench.quality_tables import CORRECTION, SELECTORS, at, families


def point(density: float, recall: float, error: float | None = None, corrected: float | None = None) -> dict[str, Any]:
    return {"density": density, "recall": recall, "error": error, "corrected": corrected}


def test_interpolation_is_linear_in_log_density() -> None:
    points = [point(0.1, 0.8, 0.4), point(0.4, 0.9, 0.2, 0.1), point(0.8, 0.98, None, 0.05)]
    assert at(points, "recall", 0.2) == pytest.approx(0.85)
    assert at(points, "recall", 0.1) == 0.8 and at(points, "recall", 0.8) == pytest.approx(0.98)
    assert at(points, "recall", 0.4 * 2**0.25) == pytest.approx(0.92)
    assert at(points, "recall", 0.0999) is None and at(points, "recall", 0.801) is None
    assert at(points, "error", 0.2) == pytest.approx(0.3) and at(points, "error", 0.5) is None
    assert at(points, "corrected", 0.2) is None
    assert at(points, "corrected", 0.4 * 2**0.5) == pytest.approx(0.075)
    assert at([point(0.2, 0.5)], "recall", 0.2) == 0.5


def quality_row(
    selector: str, settings: dict[str, Any], density: float, recall: float, error: float, **fields: Any
) -> dict[str, Any]:
    conditions = {"kind": "quality", "device": "cuda", "gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}
    conditions |= {"commit": "abc123", "date": "2026-11-22", "length": 8192, "batch": 1, "heads": 8, "kv_heads": 2}
    conditions |= {"head_dim": 64, "dtype": "bfloat16", "workload": "needle", "layer": 0, "seed": 0}
    conditions |= {"model_sha256": "0123456789abcdef"}
    conditions |= {"backend": "TRITON", "mean_correction": False, "dense_error": 0.0021}
    measured = {"selector": selector, "settings": settings, "density": density, "recall": recall}
    measured |= {"error": error, "error_max": 2 * error}
    return conditions | measured | fields


def sweep(selector: str, knob: str, fixed: dict[str, Any], recalls: tuple[float, float], **fields: Any) -> list[Any]:
    """Two layers of two settings at densities 10 and 40 %, with and without correction; errors 0.3 and 0.1."""
    rows = []
    for layer, shift in ((0, -0.01), (1, 0.01)):
        for value, density, recall, error in ((0.05, 0.4, recalls[1], 0.1), (0.2, 0.1, recalls[0], 0.3)):
            settings = {knob: value, **fixed}
            found = (density * (1 + shift), recall + shift, error)
            rows.append(quality_row(selector, settings, *found, layer=layer, **fields))
            found = (density * (1 + shift), recall + shift, error / 2)
            rows.append(quality_row(selector, settings, *found, layer=layer, mean_correction=True, **fields))
    return rows


PUBLISHED_NAME, PAPER_NAME = "flexprefill, min_budget 512", "flexprefill, min_budget 512, variant paper"
PUBLISHED = {"tau": 0.1, "min_budget": 512, "variant": "published"}
ROWS = [
    *sweep("flexprefill", "gamma", PUBLISHED, (0.8, 0.96)),
    *sweep("flexprefill", "gamma", PUBLISHED | {"variant": "paper"}, (0.81, 0.97)),
    *sweep("flashprefill", "alpha", {"sink_blocks": 2}, (0.9, 0.94)),
]


def cells(table: str, *first: str) -> list[str]:
    start = "| " + " | ".join(first) + " |"
    (line,) = [line for line in table.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")][len(first) :]


def test_selectors_at_equal_densities() -> None:
    table = SELECTORS.markdown(ROWS)
    for part in (
        "NVIDIA H200",
        "torch 2.11.0",
        "commit abc123",
        "8 heads, kv_heads 2",
        "bfloat16",
        "layer 0, 1, seed 0",
    ):
        assert part in table.splitlines()[0]
    assert table.endswith("an error of 0.0021.")
    published = cells(table, "8,192", PUBLISHED_NAME)
    assert published[:3] == ["0.800", "0.880", "0.960"], "no column for a density that no sweep reaches"
    assert published[3:] == ["**0.300**", "**0.200**", "**0.100**", "**0.150**", "**0.100**", "**0.050**"]
    assert cells(table, "8,192", PAPER_NAME)[:3] == ["0.810", "0.890", "**0.970**"]
    assert cells(table, "8,192", "flashprefill")[:3] == ["**0.900**", "**0.920**", "0.940"]


def test_a_smaller_error_is_the_better_one() -> None:
    rows = [row | {"error": row["error"] * (0.9 if row["selector"] == "flashprefill" else 1)} for row in ROWS]
    table = SELECTORS.markdown(rows)
    assert cells(table, "8,192", "flashprefill")[3::3] == ["**0.270**", "**0.135**"]
    assert cells(table, "8,192", PUBLISHED_NAME)[3::3] == ["0.300", "0.150"]


def test_means_take_whole_sets_of_layers_alone() -> None:
    (group,) = SELECTORS.groups([*ROWS, *ROWS[:1]])
    assert len(group) == len(ROWS), "a later row takes an earlier one's place"
    found = families(group, 8192)
    assert list(found) == [PUBLISHED_NAME, PAPER_NAME, "flashprefill"]
    low, high = found[PUBLISHED_NAME]
    assert [low[name] for name in ("density", "recall", "error", "corrected")] == pytest.approx([0.1, 0.8, 0.3, 0.15])
    assert (high["settings"]["gamma"], high["density"]) == (0.05, pytest.approx(0.4))
    half = [row for row in group if row is not group[-1]]  # layer 1, alpha 0.2, corrected
    first = families(half, 8192)["flashprefill"][0]
    assert first["corrected"] is None and first["error"] is not None
    third = [*group, *(row | {"layer": 2} for row in group if row["selector"] == "flashprefill")]
    assert list(families(third, 8192)) == ["flashprefill"]
    assert len(SELECTORS.groups([*ROWS, ROWS[0] | {"gpu": "NVIDIA H100"}])) == 2


def test_mean_correction_table() -> None:
    rows = [*ROWS, *sweep("flashprefill", "alpha", {"sink_blocks": 2}, (0.7, 0.9), length=32768)]
    table = CORRECTION.markdown(rows)
    assert cells(table, "8,192", "flashprefill, alpha 0.05")[:5] == ["0.400", "0.940", "0.100", "0.050", "0.500"]
    assert cells(table, "8,192", "flashprefill, alpha 0.05")[5:] == ["0.200", "0.100"]
    assert cells(table, "8,192", "flashprefill, alpha 0.2")[:5] == ["0.100", "0.900", "0.300", "0.150", "0.500"]
    assert cells(table, "32,768", "flashprefill, alpha 0.2")[1] == "0.700"
    plain = [row for row in rows if not row["mean_correction"]]
    assert cells(CORRECTION.markdown(plain), "8,192", "flashprefill, alpha 0.2")[2:] == ["0.300", "0.600"]
    assert CORRECTION.markdown(ROWS[:8]) == CORRECTION.markdown([]) == SELECTORS.markdown([]) == ""


def test_rows_of_another_model_are_another_table() -> None:
    rows = sweep("flashprefill", "alpha", {}, (0.7, 0.9))
    others = [{**row, "model_sha256": "f" * 64, "recall": 0.5} for row in rows]
    alone = SELECTORS.markdown(rows)
    assert "(SHA-256 0123456789)" in alone
    assert SELECTORS.markdown([*rows, *others]).startswith(alone)
    assert "(SHA-256 ffffffffff)" in SELECTORS.markdown([*rows, *others])
