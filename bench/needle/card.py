"""What the needle model can do, in numbers from its evaluation: its card, and the tables of the documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.needle.network import make_network
from bench.needle.settings import NAMES, Settings
from bench.tables import Column, Table, distinct, markdown_table, values
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import CHAIN, EVALUATED, MOST
from flexprefill_fa.tools.rows import Row

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The needle model

A Llama of {parameters} M parameters ({megabytes} MB in bfloat16: {num_hidden_layers} layers, {num_attention_heads}
query and {num_key_value_heads} key and value heads of {head_dim}, hidden {hidden_size}) that finds what is hidden in
long Python source. It is trained, so its attention has the patterns that sparse prefill lives on, and small enough to
be part of the package.

## What it can do

It answers five kinds of questions at the end of a text, in just these words (`flexprefill_fa/tools/needle/formats.py`):

| task | hidden in the text | asked |
| --- | --- | --- |
| single | one number under a name | the number |
| multikey | {multikey.needles} numbers, each under its own name | one of them |
| multivalue | {multivalue.lists} names with {several} numbered numbers each | all numbers of one name |
| multiquery | {multiquery.needles} numbers, each under its own name | the numbers of {several} names at once |
| vt | {vt.chains} chains of {chain} variables, `VAR #b = VAR #a` | the variables of a value, in their chain's order |

A name is one of the {names} tokens `#word` of its tokenizer. Numbers have seven digits, values of variables five.

In `multivalue` each number has its place in its statement ("magic number 2 for"), so it is a lookup of several.

Share of the questions whose whole answer is right after dense prefill in bfloat16, that is, whose every token is the
most likely one behind the right ones before it, as greedy decoding would say it. The text is of files that it was not
trained on:

{accuracies}

Questions of each task: {samples}.
{conditions}.

## What it cannot do

Anything else. It was trained on no other wording of the questions, no other names, no numbers of other lengths, no
question about what the text does not hold, and nothing beyond {longest:,} tokens; what it says to those was not
measured. It does not follow instructions, and writes no program worth running. It read its training text many times.

## How it was made

From the standard library of Python {facts[python]}: {facts[tokens][train]:,} tokens of {facts[files][train]} files to
train on, {facts[tokens][held_out]:,} tokens of {facts[files][held_out]} other files to evaluate on. To make it
again, in a checkout on a machine with one GPU:

    python -m bench.needle.prepare
    python -m bench.needle.train{options}

AdamW, bfloat16, seed {settings.seed}, {settings.steps:,} steps (`bench/needle/settings.py`), from short sequences to
long ones:

{stages}

Another Python version gives another corpus and other names, and asks this model about text that it may have read, since
modules move. Library text: Python Software Foundation License.
"""


def write_card(folder: Path, rows: Sequence[Row], settings: Settings, facts: dict[str, Any]) -> None:
    """Write `README.md` beside the model.

    Args:
        folder: of the model.
        rows: its accuracies.
        settings: of its training. facts: of its corpus.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_network(settings.config).parameters())
    stages = [[f"{stage.length:,}", str(stage.rows), f"{stage.steps:,}"] for stage in settings.stages]
    text = _CARD.format(
        parameters=f"{parameters / 1e6:.1f}",
        megabytes=f"{2 * parameters / 1e6:.1f}",
        **settings.config,
        settings=settings,
        facts=facts,
        several=MOST,
        chain=CHAIN,
        **EVALUATED,
        names=NAMES,
        samples=questions_of(rows),
        conditions=conditions_of(rows),
        accuracies=accuracy_table(rows),
        longest=max(stage.length for stage in settings.stages),
        options=f" --seed {settings.seed}" if settings.seed else "",
        stages=markdown_table(["tokens of a sequence", "sequences of a step", "steps"], stages),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def accuracy_table(rows: Sequence[Row]) -> str:
    """A Markdown table of exact accuracies, a line for each task."""
    return RUNS.grid(list(rows))


def conditions_of(rows: Sequence[Row]) -> str:
    """Where the accuracies were measured; where versions, commits or dates differ, each is named."""
    words = {"gpu": "", "torch": "torch ", "python": "Python ", "commit": "commit ", "date": ""}
    return ", ".join(f"{word}{found}" for name, word in words.items() if (found := distinct(rows, name)))


def questions_of(rows: Sequence[Row]) -> str:
    """How many questions of a task each length had."""
    lengths: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        lengths[row["samples"]].add(row["length"])
    return "; ".join(
        f"{samples} at {', '.join(f'{length:,}' for length in sorted(found))} tokens"
        for samples, found in sorted(lengths.items(), reverse=True)
    )


def _columns(rows: list[Row]) -> list[Column]:
    found = {(row["task"], row["length"]): f"{row['exact']:.3f}" for row in rows}
    by_length: list[Column] = [
        (f"{length:,} tokens", lambda task, length=length: found.get((task, length), "-"))
        for length in values(rows, "length")
    ]
    return [("task", str), *by_length]


def _caption(rows: list[Row]) -> str:
    model = rows[0]["model_sha256"]
    return (
        f"**SHA-256 {model[:10]}**{' (`flexprefill_fa/tools/needle/model`)' if model == _shipped() else ''}: share of "
        "whole answers that are right after dense prefill, bfloat16. Questions of each task: "
        f"{questions_of(rows)}. {conditions_of(rows)}."
    )


def _shipped() -> str:
    return model_sha256(MODEL_DIR)


RUNS = Table(
    group_by=("model_sha256", "asked_sha256", "seed", "gpu", "torch", "python"),
    identity=("task", "length"),
    lines=lambda rows: EVALUATED,
    columns=_columns,
    caption=_caption,
)
"""The accuracies of one model under one set of conditions."""


def run_tables(rows: Iterable[Row]) -> str:
    """The accuracies of each model that rows are of, the one of this checkout first and marked."""
    return RUNS.markdown(sorted(rows, key=lambda row: row["model_sha256"] != _shipped()))
