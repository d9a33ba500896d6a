"""The generated parts of documents: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.accuracy_tables import ANSWERS, REAL_TASKS, SUMMARY, TASKS
from bench.fidelity_tables import CHUNKS, fidelity_summary, leaderboards, plain_sweeps, single_settings
from bench.host_tables import HOST
from bench.needle.tables import run_tables
from bench.paths import ROOT
from bench.quality_tables import CORRECTION, SELECTORS
from bench.serve_tables import ENGINES, serve_tables
from bench.speed_tables import DENSITY, GIVEN, PEERS, attention_tables, demo_table, shown_first
from bench.ttft_tables import speed_summary, ttft_tables
from flexprefill_fa.tools.rows import Row, read

DOCUMENTS: dict[Path, tuple[str, ...]] = {
    ROOT / document: tuple(blocks.split())
    for document, blocks in {
        "README.md": "plot speed-summary fidelity-summary",
        "docs/benchmarks.md": "attention attention-fixed attention-needle density host ttft serving attention-cpu "
        "peers given",
        "docs/accuracy.md": "fidelity-plot fidelity fidelity-settings ruler accuracy-plot accuracy-summary needle "
        "accuracy quality-plot quality mean-correction",
        "docs/command_line.md": "demo",
        "docs/serving.md": "chunks",
    }.items()
}
"""Which blocks stand in which document."""

_BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:([\w-]+) -->")

TABLES: dict[str, tuple[Any, ...]] = {
    "attention": (partial(attention_tables, device="cuda", workload="sharpened"), "attention"),
    "attention-fixed": (partial(attention_tables, device="cuda", workload="fixed"), "attention"),
    "attention-needle": (partial(attention_tables, device="cuda", workload="needle"), "attention"),
    "attention-cpu": (partial(attention_tables, device="cpu", workload="needle"), "attention"),
    "density": (DENSITY.markdown, "attention"),
    "host": (HOST.markdown, "host"),
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
    """A picture of what is `drawn` of rows, where there is something: NAME.png beside them, by plots.draw_NAME."""

    name: str
    rows: str
    drawn: Callable[[list[Row]], object]
    what: str


_AGAINST = "against the density it keeps"
PLOTS = {
    "plot": Plot(
        "attention",
        "attention",
        shown_first,
        "Time and speed-up of sparse prefill attention against the length of the prompt",
    ),
    "accuracy-plot": Plot("accuracy", "quality", TASKS.groups, f"Task accuracy of each selector {_AGAINST}"),
    "quality-plot": Plot(
        "quality", "quality", SELECTORS.groups, f"Recall and output error of each selector {_AGAINST}"
    ),
    "fidelity-plot": Plot(
        "fidelity",
        "fidelity",
        plain_sweeps,
        "KL to dense attention against the density that each selector keeps, on real models",
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
    if not plot.drawn(read(results / f"{plot.rows}.jsonl")):
        return ""
    file = results / f"{plot.name}.png"
    folder = next(document.parent for document, names in DOCUMENTS.items() if block in names)
    return f"![{plot.what}]({os.path.relpath(file, folder) if file.is_relative_to(ROOT) else file})"


def draw_plots(results: Path) -> None:
    """Draw, beside the rows of a folder, every plot that has some."""
    from bench import plots  # takes a second to import, and tables need none

    for plot in PLOTS.values():
        if drawn := plot.drawn(read(results / f"{plot.rows}.jsonl")):
            getattr(plots, f"draw_{plot.name}")(drawn, results / f"{plot.name}.png")


def render_document(document: Path, expected: Sequence[str], results: Path) -> str:
    """What a document shall say: its text with every block between markers rewritten by the rows in a folder."""
    text = document.read_text(encoding="utf-8")
    blocks = [match["name"] for match in _BLOCK.finditer(text)]
    markers = _MARKER.findall(text)
    if sorted(blocks) != sorted(expected) or len(markers) != 2 * len(blocks):
        raise ValueError(
            f"{document.name} must hold the blocks {', '.join(expected) or 'none'}, each from a <!-- bench:NAME --> to "
            f"its <!-- /bench:NAME --> on lines of their own, got whole ones {', '.join(blocks) or 'none'}, and "
            f"markers of {', '.join(sorted(set(markers))) or 'none'}"
        )

    def rendered(match: re.Match[str]) -> str:
        body = body_of(match["name"], results)
        middle = f"\n{body}\n\n" if body else ""
        return f"<!-- bench:{match['name']} -->\n{middle}<!-- /bench:{match['name']} -->"

    return _BLOCK.sub(rendered, text)
