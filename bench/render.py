"""The generated parts of documents: what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.accuracy_tables import SUMMARY, TASKS, USUAL
from bench.fidelity_tables import CHUNKS, LEADERBOARD, SINGLES, fidelity_summary, plain_sweeps
from bench.needle.tables import run_tables
from bench.quality_tables import CORRECTION, SELECTORS
from bench.serve_tables import ENGINES, serve_tables
from bench.speed_tables import GIVEN, HOST, PEERS, PREFILL, SELECTION, attention_tables, demo_table, shown_first
from bench.ttft_tables import FIRST_TOKEN, speed_summary
from flexprefill_fa.tools.rows import read

DOCUMENTS: dict[Path, dict[str, tuple[Any, ...]]] = {
    ROOT / "README.md": {
        "speed-summary": (speed_summary, "attention", "ttft"),
        "fidelity-summary": (fidelity_summary, "fidelity"),
    },
    ROOT / "docs/benchmarks.md": {
        "attention": (partial(attention_tables, device="cuda", workload="sharpened"), "attention"),
        "attention-fixed": (partial(attention_tables, device="cuda", workload="fixed"), "attention"),
        "attention-needle": (partial(attention_tables, device="cuda", workload="needle"), "attention"),
        "attention-cpu": (partial(attention_tables, device="cpu", workload="needle"), "attention"),
        "density": (GIVEN.markdown, "attention"),
        "attention-model": (partial(attention_tables, device="cuda", workload="model"), "attention"),
        "host": (HOST.markdown, "host"),
        "prefill": (PREFILL.markdown, "host"),
        "ttft": (FIRST_TOKEN.markdown, "ttft"),
        "serving": (serve_tables, *ENGINES),
        "peers": (PEERS.markdown, "peers"),
        "given": (GIVEN.markdown, "peers"),
    },
    ROOT / "docs/accuracy.md": {
        "fidelity": (LEADERBOARD.markdown, "fidelity"),
        "selection": (SELECTION.markdown, "attention"),
        "fidelity-settings": (SINGLES.markdown, "fidelity"),
        "ruler-summary": (USUAL.markdown, "ruler"),
        "ruler": (TASKS.markdown, "ruler"),
        "accuracy-summary": (SUMMARY.markdown, "quality"),
        "needle": (run_tables, "needle"),
        "accuracy": (TASKS.markdown, "quality"),
        "quality": (SELECTORS.markdown, "quality"),
        "mean-correction": (CORRECTION.markdown, "quality"),
    },
    ROOT / "docs/command_line.md": {"demo": (demo_table, "demo")},
    ROOT / "docs/serving.md": {"chunks": (CHUNKS.markdown, "chunks")},
}
"""The blocks of each document by the name of their markers: what makes Markdown, and from which rows."""
BLOCKS = {name: made for blocks in DOCUMENTS.values() for name, made in blocks.items()}
_BLOCK = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:([\w-]+) -->")


def body_of(block: str, results: Path) -> str:
    """What stands between a block's markers, from a folder of rows; empty where there are none for it.

    Raises:
        ValueError: where a row lacks a field.
    """
    made, *files = BLOCKS[block]
    try:
        return made(*(read(results / f"{file}.jsonl") for file in files))
    except KeyError as error:
        raise ValueError(
            f"a row of {' or '.join(f'{file}.jsonl' for file in files)} has no {error}, which the block {block} shows: "
            "take out rows of older versions, or measure them again"
        ) from error


def draw_plots(results: Path) -> None:
    """Draw attention.png and fidelity.png beside the rows of a folder, where there are rows for them."""
    from bench import plots  # takes a second to import, and tables need none

    if shown := shown_first(read(results / "attention.jsonl")):
        plots.draw_attention(shown, results / "attention.png")
    if sweeps := plain_sweeps(read(results / "fidelity.jsonl")):
        plots.draw_fidelity(sweeps, results / "fidelity.png")


def render_document(document: Path, expected: Iterable[str], results: Path) -> str:
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
