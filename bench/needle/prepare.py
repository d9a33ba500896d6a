"""`python -m bench.needle.prepare`: the tokenizer and the token corpus of the needle model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bench.needle.corpus import PACKAGES, build_corpus
from bench.needle.network import Shape
from bench.paths import ROOT
from bench.terminal import one_line_errors, require_packages
from flexprefill_fa.tools.needle.source import source_files
from flexprefill_fa.tools.progress import WorkProgress

WORK = ROOT / "build" / "needle"
"""Where corpus, checkpoint and model are made; git ignores it."""

CORPUS = "corpus"
"""The corpus's folder in there."""


def prepare(
    out: Annotated[Path, typer.Option(help="The work folder; the corpus goes to its folder 'corpus'.")] = WORK,
    seed: Annotated[int, typer.Option(min=0, help="Of the 512 words that become names.")] = 0,
) -> None:
    """Make tokenizer and token corpus from the standard library of this Python, a tenth of its files held out.

    The same Python version gives the same corpus.
    """
    started = time.monotonic()
    with one_line_errors():
        require_packages(*PACKAGES)
        files = len(source_files())
        with WorkProgress().task(f"{files} files") as advance:
            corpus = build_corpus(out / CORPUS, Shape().positions, seed, advance)
    tokens, counts = corpus.facts["tokens"], corpus.facts["files"]
    typer.echo(
        f"{tokens['train']:,} tokens of {counts['train']} files to train on, {tokens['held_out']:,} of "
        f"{counts['held_out']} held out, Python {corpus.facts['python']}, in {time.monotonic() - started:.0f} s: "
        f"{corpus.folder}"
    )


if __name__ == "__main__":
    typer.run(prepare)
