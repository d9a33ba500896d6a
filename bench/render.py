"""The generated parts of documents: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.accuracy_tables import ANSWERS, REAL_TASKS, SUMMARY, TASKS
from bench.fidelity_tables import fidelity_summary, leaderboards, single_settings, sweeps
from bench.needle.card import run_tables
from bench.paths import ROOT
from bench.quality_tables import CORRECTION, SELECTORS
from bench.serve_tables import ENGINES, serve_tables
from bench.speed_tables import (
    ATTENTION,
    GIVEN,
    PEERS,
    attention_tables,
    demo_table,
    density_tables,
    shown_first,
)
from bench.ttft_tables import speed_summary, ttft_tables
from flexprefill_fa.tools.rows import Row, read

_TIME = (
    *("attention", "attention-fixed", "attention-needle", "density", "ttft", "serving"),
    *("attention-cpu", "peers", "given"),
)
_QUALITY = ("fidelity-plot", "fidelity", "fidelity-settings", "ruler", "accuracy-plot", "accuracy-summary", "needle")
_QUALITY += ("accuracy", "quality-plot", "quality", "mean-correction")
DOCUMENTS: dict[Path, tuple[str, ...]] = {
    ROOT / "README.md": ("plot", "speed-summary", "fidelity-summary"),
    ROOT / "docs" / "benchmarks.md": _TIME,
    ROOT / "docs" / "accuracy.md": _QUALITY,
    ROOT / "docs" / "command_line.md": ("demo",),
}
"""Which blocks stand in which document."""

_BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (/?)bench:([\w-]+) -->")

Rows = list[Row]
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "attention": (lambda rows: attention_tables(rows, "cuda", "sharpened"), ("attention.jsonl",)),
    "attention-fixed": (lambda rows: attention_tables(rows, "cuda", "fixed"), ("attention.jsonl",)),
    "attention-needle": (lambda rows: attention_tables(rows, "cuda", "needle"), ("attention.jsonl",)),
    "attention-cpu": (lambda rows: attention_tables(rows, "cpu", "needle"), ("attention.jsonl",)),
    "density": (density_tables, ("attention.jsonl",)),
    "speed-summary": (speed_summary, ("attention.jsonl", "ttft.jsonl")),
    "accuracy": (TASKS.markdown, ("quality.jsonl",)),
    "accuracy-summary": (SUMMARY.markdown, ("quality.jsonl",)),
    "quality": (SELECTORS.markdown, ("quality.jsonl",)),
    "mean-correction": (CORRECTION.markdown, ("quality.jsonl",)),
    "ttft": (ttft_tables, ("ttft.jsonl", "quality.jsonl")),
    "needle": (run_tables, ("needle.jsonl",)),
    "serving": (serve_tables, tuple(f"{name}.jsonl" for name in ENGINES)),
    "fidelity": (leaderboards, ("fidelity.jsonl", "attention.jsonl", ANSWERS)),
    "fidelity-settings": (single_settings, ("fidelity.jsonl",)),
    "fidelity-summary": (fidelity_summary, ("fidelity.jsonl",)),
    "ruler": (REAL_TASKS.markdown, (ANSWERS,)),
    "peers": (PEERS.markdown, ("peers.jsonl",)),
    "given": (GIVEN.markdown, ("peers.jsonl",)),
    "demo": (demo_table, ("demo.jsonl",)),
}
"""By the name of their markers: Markdown from the rows of files, empty where there are no rows for it."""


@dataclass(frozen=True)
class Plot:
    """A picture: its file beside its `rows`, whether there is something to draw, and what it shows."""

    file: str
    rows: str
    drawn: Callable[[Rows], object]
    what: str


PLOTS = {
    "plot": Plot(
        "attention.png",
        "attention.jsonl",
        lambda rows: ATTENTION.groups(filter(shown_first, rows)),
        "Time and speed-up of sparse prefill attention against the length of the prompt",
    ),
    "accuracy-plot": Plot(
        "accuracy.png",
        "quality.jsonl",
        TASKS.groups,
        "Task accuracy of each selector against the density it keeps",
    ),
    "quality-plot": Plot(
        "quality.png",
        "quality.jsonl",
        SELECTORS.groups,
        "Recall and output error of each selector against the density it keeps",
    ),
    "fidelity-plot": Plot(
        "fidelity.png",
        "fidelity.jsonl",
        lambda rows: [group for group in sweeps(rows) if group[0]["text"] == "source"],
        "KL to dense attention against the density that each selector keeps, on real models",
    ),
}
"""By the name of their markers."""
BLOCKS = (*TABLES, *PLOTS)


def body_of(block: str, results: Path) -> str:
    """What stands between a block's markers, from a folder of rows; a picture's path is relative to its document."""
    if block in TABLES:
        table, files = TABLES[block]
        return table(*(read(results / file) for file in files))
    plot = PLOTS[block]
    if not plot.drawn(read(results / plot.rows)):
        return ""
    file = results / plot.file
    folder = next(document.parent for document, names in DOCUMENTS.items() if block in names)
    return f"![{plot.what}]({os.path.relpath(file, folder) if file.is_relative_to(ROOT) else file})"


def draw_plots(results: Path) -> None:
    """Draw, beside the rows of a folder, every plot that has some."""
    from bench.plots import DRAW  # takes a second to import, and tables need none

    for block, plot in PLOTS.items():
        if plot.drawn(rows := read(results / plot.rows)):
            DRAW[block](rows, results / plot.file)


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
    markers = _MARKER.findall(text)
    blocks = [match["name"] for match in _BLOCK.finditer(text)]
    if [name for slash, name in markers if not slash] != blocks or len(markers) != 2 * len(blocks):
        raise ValueError(
            f"every <!-- bench:NAME --> needs its <!-- /bench:NAME --> behind it, on lines of their own; got markers "
            f"of {', '.join(sorted({name for _, name in markers}))}, whole blocks of {', '.join(blocks) or 'none'}"
        )
    unknown = sorted(set(blocks) - set(BLOCKS))
    if unknown:
        raise ValueError(f"unknown block {', '.join(unknown)}, expected one of {', '.join(BLOCKS)}")

    def rendered(match: re.Match[str]) -> str:
        body = body_of(match["name"], results)
        middle = f"\n{body}\n\n" if body else ""
        return f"<!-- bench:{match['name']} -->\n{middle}<!-- /bench:{match['name']} -->"

    return _BLOCK.sub(rendered, text)
