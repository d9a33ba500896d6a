"""The needle model's recipe at a size that learns nothing: runs of it, and its commands as a shell sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from typer.testing import CliRunner, Result

from bench.needle.batches import Builder
from bench.needle.corpus import Corpus
from bench.needle.pace import Clock
from bench.needle.run import Run
from bench.needle.settings import TINY, Settings
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.rows import read

CPU = torch.device("cpu")
FILES = 12
"""Of each part of the corpus."""


def run_of(folder: Path, corpus: Corpus, settings: Settings = TINY, minutes: float | None = None) -> Run:
    return Run(settings, corpus, folder, CPU, Clock(minutes), False, lambda line: None)


def source_drawn(builder: Builder) -> bytes:
    """A piece of the text that a builder's sequences are made of, as bytes of uint16 like a corpus's parts."""
    batch = builder.build(1, 700, EVALUATED["single"], torch.Generator().manual_seed(0))
    return batch.tokens[batch.source].numpy().astype("uint16").tobytes()


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{**row, "tokens_per_second": 0} for row in read(folder / "curve.jsonl")]


def command(function: Any, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, arguments)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
