"""`python -m bench.needle.prepare`: the tokenizer and the token corpus of the needle model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.needle.corpus import build_corpus
from bench.paths import ROOT
from bench.terminal import one_line_errors

WORK = ROOT / "build" / "needle"
"""Where corpus, checkpoint and model are made; git ignores it."""

CORPUS = "corpus"
"""The corpus's folder in there."""


def prepare(
    out: Annotated[Path, typer.Option(help="The work folder; the corpus goes to its folder 'corpus'.")] = WORK,
) -> None:
    """Make tokenizer and token corpus from the standard library of this Python, a tenth of its files held out.

    The same Python version gives the same corpus. It takes a minute.
    """
    with one_line_errors():
        corpus = build_corpus(out / CORPUS)
    tokens, files = corpus.facts["tokens"], corpus.facts["files"]
    typer.echo(
        f"{tokens['train']:,} tokens of {files['train']} files to train on, {tokens['held_out']:,} of "
        f"{files['held_out']} held out, Python {corpus.facts['python']}: {corpus.folder}"
    )


if __name__ == "__main__":
    typer.run(prepare)
