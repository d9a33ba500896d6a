"""The generated parts of documents: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.accuracy_summary import accuracy_summaries
from bench.accuracy_tables import accuracy_tables, task_tables
from bench.fidelity_summary import fidelity_summary
from bench.fidelity_tables import leaderboards, single_settings, sweeps
from bench.needle.run_tables import run_tables
from bench.paths import ROOT
from bench.peer_tables import peer_tables
from bench.quality_points import quality_groups
from bench.quality_tables import correction_tables, selector_tables
from bench.real_answers import ANSWERS, RealAnswers
from bench.selection_costs import selection_costs
from bench.serve_tables import ENGINES, serve_tables
from bench.speed_summary import speed_summary
from bench.tables import attention_tables, demo_table, density_tables, groups
from bench.ttft_tables import ttft_tables
from flexprefill_fa.tools.rows import read

DOCUMENTS: dict[Path, tuple[str, ...]] = {
    ROOT / "README.md": ("plot", "speed-summary", "fidelity-summary"),
    ROOT / "docs" / "benchmarks.md": (
        "attention",
        "attention-fixed",
        "attention-needle",
        "density",
        "ttft",
        "serving",
        "attention-cpu",
        "peers",
    ),
    ROOT / "docs" / "accuracy.md": (
        "fidelity-plot",
        "fidelity",
        "fidelity-settings",
        "ruler",
        "accuracy-plot",
        "accuracy-summary",
        "needle",
        "accuracy",
        "quality-plot",
        "quality",
        "mean-correction",
    ),
    ROOT / "docs" / "command_line.md": ("demo",),
}
"""Which blocks stand in which document."""
PLOT = "attention.png"
QUALITY_PLOT = "quality.png"
ACCURACY_PLOT = "accuracy.png"
FIDELITY_PLOT = "fidelity.png"

_BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (/?)bench:([\w-]+) -->")


def _plot(results: Path) -> str:
    if not groups(read(results / "attention.jsonl"), "cuda", "sharpened", synthetic=False):
        return ""
    return _image(
        "plot", results / PLOT, "Time and speed-up of sparse prefill attention against the length of the prompt"
    )


def _accuracy_plot(results: Path) -> str:
    if not task_tables(read(results / "quality.jsonl")):
        return ""
    return _image(
        "accuracy-plot", results / ACCURACY_PLOT, "Task accuracy of each selector against the density it keeps"
    )


def _quality_plot(results: Path) -> str:
    if not quality_groups(read(results / "quality.jsonl")):
        return ""
    return _image(
        "quality-plot", results / QUALITY_PLOT, "Recall and output error of each selector against the density it keeps"
    )


def _fidelity_plot(results: Path) -> str:
    if not sweeps(read(results / "fidelity.jsonl")):
        return ""
    what = "KL to dense attention against the density that each selector keeps, on real models"
    return _image("fidelity-plot", results / FIDELITY_PLOT, what)


def _leaderboards(results: Path) -> str:
    costs, answers = selection_costs(read(results / "attention.jsonl")), RealAnswers(read(results / ANSWERS))
    return leaderboards(read(results / "fidelity.jsonl"), costs, answers)


def _image(block: str, file: Path, what: str) -> str:
    """The path is relative to the block's document."""
    folder = next(document.parent for document, names in DOCUMENTS.items() if block in names)
    shown = os.path.relpath(file, folder) if file.is_relative_to(ROOT) else file
    return f"![{what}]({shown})"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "attention": lambda results: attention_tables(read(results / "attention.jsonl"), "cuda", "sharpened"),
    "attention-fixed": lambda results: attention_tables(read(results / "attention.jsonl"), "cuda", "fixed"),
    "attention-needle": lambda results: attention_tables(read(results / "attention.jsonl"), "cuda", "needle"),
    "attention-cpu": lambda results: attention_tables(read(results / "attention.jsonl"), "cpu", "needle"),
    "density": lambda results: density_tables(read(results / "attention.jsonl")),
    "plot": _plot,
    "speed-summary": lambda results: speed_summary(read(results / "attention.jsonl"), read(results / "ttft.jsonl")),
    "accuracy": lambda results: accuracy_tables(read(results / "quality.jsonl")),
    "accuracy-summary": lambda results: accuracy_summaries(read(results / "quality.jsonl")),
    "accuracy-plot": _accuracy_plot,
    "quality": lambda results: selector_tables(read(results / "quality.jsonl")),
    "quality-plot": _quality_plot,
    "mean-correction": lambda results: correction_tables(read(results / "quality.jsonl")),
    "ttft": lambda results: ttft_tables(read(results / "ttft.jsonl"), read(results / "quality.jsonl")),
    "needle": lambda results: run_tables(read(results / "needle.jsonl")),
    "serving": lambda results: serve_tables(row for name in ENGINES for row in read(results / f"{name}.jsonl")),
    "fidelity": _leaderboards,
    "fidelity-plot": _fidelity_plot,
    "fidelity-settings": lambda results: single_settings(read(results / "fidelity.jsonl")),
    "fidelity-summary": lambda results: fidelity_summary(read(results / "fidelity.jsonl")),
    "ruler": lambda results: accuracy_tables(read(results / ANSWERS)),
    "peers": lambda results: peer_tables(read(results / "peers.jsonl")),
    "demo": lambda results: demo_table(read(results / "demo.jsonl")),
}
"""Markdown by the name of its markers, from the folder of result rows; empty where there are no rows for it."""


def render_document(document: Path, expected: Sequence[str], results: Path) -> str:
    """What a document shall say, by the rows in a folder.

    Raises:
        ValueError: as `render_text`, and where other blocks stand in it than are expected.
    """
    text = document.read_text(encoding="utf-8")
    rendered = render_text(text, results)
    blocks = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(blocks) != sorted(expected):
        raise ValueError(
            f"{document.name} must hold the blocks {', '.join(expected) or 'none'}, got {', '.join(blocks) or 'none'}"
        )
    return rendered


def render_text(text: str, results: Path) -> str:
    """`text` with every block between markers rewritten.

    Raises:
        ValueError: for a marker without its partner, an unknown name, or a broken row.
    """
    opened = [name for slash, name in _MARKER.findall(text) if not slash]
    blocks = [match["name"] for match in _BLOCK.finditer(text)]
    if opened != blocks or len(_MARKER.findall(text)) != 2 * len(blocks):
        names = sorted({name for _, name in _MARKER.findall(text)})
        raise ValueError(
            f"every <!-- bench:NAME --> needs its <!-- /bench:NAME --> behind it, on lines of their own; got markers "
            f"of {', '.join(names)}, whole blocks of {', '.join(blocks) or 'none'}"
        )
    unknown = sorted(set(blocks) - set(BLOCKS))
    if unknown:
        raise ValueError(f"unknown block {', '.join(unknown)}, expected one of {', '.join(BLOCKS)}")

    def rendered(match: re.Match[str]) -> str:
        name = match["name"]
        body = BLOCKS[name](results)
        middle = f"\n{body}\n\n" if body else ""
        return f"<!-- bench:{name} -->\n{middle}<!-- /bench:{name} -->"

    return _BLOCK.sub(rendered, text)
