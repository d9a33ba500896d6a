"""The generated parts of documents: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.accuracy_tables import ANSWERS, REAL_TASKS, SUMMARY, TASKS
from bench.fidelity_tables import CHUNKS, fidelity_summary, leaderboards, single_settings, sweeps
from bench.needle.tables import run_tables
from bench.paths import ROOT
from bench.quality_tables import CORRECTION, SELECTORS
from bench.serve_tables import ENGINES, serve_tables
from bench.speed_tables import (
    GIVEN,
    PEERS,
    attention_tables,
    demo_table,
    density_tables,
    shown_first,
)
from bench.ttft_tables import speed_summary, ttft_tables
from flexprefill_fa.tools.rows import Row, read

DOCUMENTS: dict[Path, tuple[str, ...]] = {
    ROOT / document: tuple(blocks.split())
    for document, blocks in {
        "README.md": "plot speed-summary fidelity-summary",
        "docs/benchmarks.md": "attention attention-fixed attention-needle density ttft serving attention-cpu peers "
        "given",
        "docs/accuracy.md": "fidelity-plot fidelity fidelity-settings ruler accuracy-plot accuracy-summary needle "
        "accuracy quality-plot quality mean-correction",
        "docs/command_line.md": "demo",
        "docs/serving.md": "chunks",
    }.items()
}
"""Which blocks stand in which document."""

_BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (/?)bench:([\w-]+) -->")

Rows = list[Row]
TABLES: dict[str, tuple[Any, ...]] = {
    **{
        name: (partial(attention_tables, device=device, workload=workload), "attention")
        for name, device, workload in (
            ("attention", "cuda", "sharpened"),
            ("attention-fixed", "cuda", "fixed"),
            ("attention-needle", "cuda", "needle"),
            ("attention-cpu", "cpu", "needle"),
        )
    },
    "density": (density_tables, "attention"),
    "speed-summary": (speed_summary, "attention", "ttft"),
    "accuracy": (TASKS.markdown, "quality"),
    "accuracy-summary": (SUMMARY.markdown, "quality"),
    "quality": (SELECTORS.markdown, "quality"),
    "mean-correction": (CORRECTION.markdown, "quality"),
    "ttft": (ttft_tables, "ttft", "quality"),
    "needle": (run_tables, "needle"),
    "serving": (serve_tables, *ENGINES),
    "fidelity": (leaderboards, "fidelity", "attention", ANSWERS),
    "fidelity-settings": (single_settings, "fidelity"),
    "fidelity-summary": (fidelity_summary, "fidelity"),
    "chunks": (CHUNKS.markdown, "chunks"),
    "ruler": (REAL_TASKS.markdown, ANSWERS),
    "peers": (PEERS.markdown, "peers"),
    "given": (GIVEN.markdown, "peers"),
    "demo": (demo_table, "demo"),
}
"""By the name of their markers: what makes Markdown, empty where there are no rows for it, and from which rows."""


class Plot(NamedTuple):
    """A picture: its file beside its `rows`, whether there is something to draw, what it shows, and who draws it."""

    file: str
    rows: str
    drawn: Callable[[Rows], object]
    what: str
    draw: str


PLOTS = {
    "plot": Plot(
        "attention.png",
        "attention.jsonl",
        shown_first,
        "Time and speed-up of sparse prefill attention against the length of the prompt",
        "draw_attention",
    ),
    "accuracy-plot": Plot(
        "accuracy.png",
        "quality.jsonl",
        TASKS.groups,
        "Task accuracy of each selector against the density it keeps",
        "draw_accuracy",
    ),
    "quality-plot": Plot(
        "quality.png",
        "quality.jsonl",
        SELECTORS.groups,
        "Recall and output error of each selector against the density it keeps",
        "draw_quality",
    ),
    "fidelity-plot": Plot(
        "fidelity.png",
        "fidelity.jsonl",
        lambda rows: [group for group in sweeps(rows) if group[0]["text"] == "source"],
        "KL to dense attention against the density that each selector keeps, on real models",
        "draw_fidelity",
    ),
}
"""By the name of their markers."""
BLOCKS = (*TABLES, *PLOTS)


def body_of(block: str, results: Path) -> str:
    """What stands between a block's markers, from a folder of rows; a picture's path is relative to its document."""
    if block in TABLES:
        table, *files = TABLES[block]
        return table(*(read(results / f"{file}.jsonl") for file in files))
    plot = PLOTS[block]
    if not plot.drawn(read(results / plot.rows)):
        return ""
    file = results / plot.file
    folder = next(document.parent for document, names in DOCUMENTS.items() if block in names)
    return f"![{plot.what}]({os.path.relpath(file, folder) if file.is_relative_to(ROOT) else file})"


def draw_plots(results: Path) -> None:
    """Draw, beside the rows of a folder, every plot that has some."""
    from bench import plots  # takes a second to import, and tables need none

    for plot in PLOTS.values():
        if plot.drawn(rows := read(results / plot.rows)):
            getattr(plots, plot.draw)(rows, results / plot.file)


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
