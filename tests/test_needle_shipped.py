"""What is said of the needle model in this checkout: its card, its goals, and the other run of its recipe."""

from __future__ import annotations

from typing import Any

from bench.needle.card import accuracy_table, conditions_of, questions_of
from bench.needle.settings import FULL
from bench.needle.train import missed_goals
from bench.paths import RESULTS
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
    assert accuracy_table(SHIPPED) in card
    assert f"{questions_of(SHIPPED)}.\n{conditions_of(SHIPPED)}.\n" in card


def test_both_runs_of_the_recipe_reach_its_goals_and_agree() -> None:
    shipped, other = exact(SHIPPED), exact(OTHER)
    assert shipped.keys() == other.keys() == CELLS
    assert missed_goals(FULL, ROWS) == [] and min(row["samples"] for row in ROWS) >= 100
    assert max(abs(shipped[cell] - other[cell]) for cell in CELLS) <= 0.03
