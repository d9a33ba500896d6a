"""The generated parts of documents: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
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
from bench.tables import attention_tables, demo_table, density_tables, groups
from bench.ttft_tables import ttft_tables
from bench.vllm_tables import vllm_tables
from flexprefill_fa.rows import read

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "accuracy.md")
PLOT = "attention.png"
QUALITY_PLOT = "quality.png"
ACCURACY_PLOT = "accuracy.png"
FIDELITY_PLOT = "fidelity.png"

_BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (/?)bench:([\w-]+) -->")


def _plot(results: Path) -> str:
    if not groups(read(results / "attention.jsonl"), "cuda", "sharpened", synthetic=False):
        return ""
    return _image(results / PLOT, "Time and speed-up of sparse prefill attention against the length of the prompt")


def _accuracy_plot(results: Path) -> str:
    if not task_tables(read(results / "quality.jsonl")):
        return ""
    return _image(results / ACCURACY_PLOT, "Task accuracy of each selector against the density it keeps")


def _quality_plot(results: Path) -> str:
    if not quality_groups(read(results / "quality.jsonl")):
        return ""
    return _image(results / QUALITY_PLOT, "Recall and output error of each selector against the density it keeps")


def _fidelity_plot(results: Path) -> str:
    if not sweeps(read(results / "fidelity.jsonl")):
        return ""
    what = "KL to dense attention against the density that each selector keeps, on real models"
    return _image(results / FIDELITY_PLOT, what, ROOT / "docs")


def _leaderboards(results: Path) -> str:
    costs, answers = selection_costs(read(results / "attention.jsonl")), RealAnswers(read(results / ANSWERS))
    return leaderboards(read(results / "fidelity.jsonl"), costs, answers)


def _image(file: Path, what: str, folder: Path = ROOT) -> str:
    """`folder` is that of the document."""
    shown = os.path.relpath(file, folder) if file.is_relative_to(ROOT) else file
    return f"![{what}]({shown})"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "attention": lambda results: attention_tables(read(results / "attention.jsonl"), "cuda", "sharpened"),
    "attention-fixed": lambda results: attention_tables(read(results / "attention.jsonl"), "cuda", "fixed"),
    "attention-needle": lambda results: attention_tables(read(results / "attention.jsonl"), "cuda", "needle"),
    "attention-cpu": lambda results: attention_tables(read(results / "attention.jsonl"), "cpu", "needle"),
    "density": lambda results: density_tables(read(results / "attention.jsonl")),
    "plot": _plot,
    "accuracy": lambda results: accuracy_tables(read(results / "quality.jsonl")),
    "accuracy-summary": lambda results: accuracy_summaries(read(results / "quality.jsonl")),
    "accuracy-plot": _accuracy_plot,
    "quality": lambda results: selector_tables(read(results / "quality.jsonl")),
    "quality-plot": _quality_plot,
    "mean-correction": lambda results: correction_tables(read(results / "quality.jsonl")),
    "ttft": lambda results: ttft_tables(read(results / "ttft.jsonl"), read(results / "quality.jsonl")),
    "needle": lambda results: run_tables(read(results / "needle.jsonl")),
    "vllm": lambda results: vllm_tables(read(results / "vllm.jsonl")),
    "fidelity": _leaderboards,
    "fidelity-plot": _fidelity_plot,
    "fidelity-settings": lambda results: single_settings(read(results / "fidelity.jsonl")),
    "fidelity-summary": lambda results: fidelity_summary(read(results / "fidelity.jsonl")),
    "ruler": lambda results: accuracy_tables(read(results / ANSWERS)),
    "peers": lambda results: peer_tables(read(results / "peers.jsonl")),
    "demo": lambda results: demo_table(read(results / "demo.jsonl")),
}
"""Markdown by the name of its markers, from the folder of result rows; empty where there are no rows for it."""


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
