"""What is said of the needle model in this checkout: its card, its goals, and the other run of its recipe."""

from __future__ import annotations

import math
from typing import Any

from safetensors import safe_open

from bench import RESULTS
from bench.needle.evaluate import missed_goals
from bench.needle.settings import FULL
from bench.needle.tables import RUNS, conditions_of, questions_of
from bench.tables import markdown
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.rows import read

ROWS = read(RESULTS / "needle.jsonl")
MODEL = model_sha256(MODEL_DIR)
SHIPPED = [row for row in ROWS if row["model_sha256"] == MODEL]
OTHER = [row for row in ROWS if row["model_sha256"] != MODEL]
CELLS = {(task, goal.length) for task in EVALUATED for goal in FULL.goals}


def exact(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    return {(row["task"], row["length"]): row["exact"] for row in rows}


def test_the_card_has_the_rows_of_the_model_beside_it() -> None:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    assert markdown(RUNS.lines(SHIPPED)) in card
    assert f"{questions_of(SHIPPED)}.\n{conditions_of(SHIPPED)}.\n" in card


def test_the_card_says_how_the_model_is_made() -> None:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    stages = "\n".join(f"| {stage.length:,} | {stage.rows} | {stage.steps:,} |" for stage in FULL.stages)
    assert f"\n{stages}\n" in card and f"seed {FULL.seed}, {FULL.steps:,} steps (" in card
    assert "    python -m bench.needle.train\n" in card
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert f"A Llama of {parameters / 1e6:.1f} M parameters ({2 * parameters / 1e6:.1f} MB in bfloat16: " in card


def test_both_runs_of_the_recipe_reach_its_goals_and_agree() -> None:
    shipped, other = exact(SHIPPED), exact(OTHER)
    assert shipped.keys() == other.keys() == CELLS
    assert missed_goals(FULL, ROWS) == [] and min(row["samples"] for row in ROWS) >= 100
    assert max(abs(shipped[cell] - other[cell]) for cell in CELLS) <= 0.03
