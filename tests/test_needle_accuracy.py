"""The needle model's accuracies: how answers are counted, and how the card and the tables tell them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from needle_runs import CPU

from bench.needle import MODEL_DIR
from bench.needle.batches import Builder
from bench.needle.card import write_card
from bench.needle.corpus import Corpus
from bench.needle.evaluation import predictions
from bench.needle.formats import EVALUATED
from bench.needle.network import Network
from bench.needle.run_tables import run_tables
from bench.needle.settings import FULL, TINY
from flexprefill_fa.digests import model_sha256

pytestmark = pytest.mark.usefixtures("one_thread")


def test_predictions_are_greedy_decoding(corpus: Corpus) -> None:
    """Of a network that says something else at every place, from the tokens before the place alone."""
    network = Network(TINY.shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    builder = Builder(corpus.tokenizer, corpus.held_out, CPU)
    batch = builder.build(2, 450, EVALUATED["multiquery"], torch.Generator().manual_seed(0), questions_last=True)
    with torch.no_grad():
        said = predictions(network, batch)
        assert said.shape == batch.places.shape
        for tokens, places, words in zip(batch.tokens, batch.places, said, strict=True):
            assert len(set(words.tolist())) > 20
            for place, word in zip(places, words, strict=True):
                assert word == network.logits(network(tokens[None, :place]))[0, -1].argmax()


def test_the_card_says_how_many_questions_each_length_had(corpus: Corpus, tmp_path: Path) -> None:
    facts = {"gpu": "X", "torch": "2", "python": "3.12.3", "commit": "abc", "date": "2026-11-23"}
    rows = [
        {"task": task, "length": goal.length, "samples": goal.samples, "exact": 0.9, "parts": 1.0, **facts}
        for goal in FULL.goals
        for task in EVALUATED
    ]
    write_card(tmp_path, rows, FULL, corpus)
    card = (tmp_path / "README.md").read_text()
    said = "512 at 4,096, 8,192, 16,384 tokens; 256 at 32,768 tokens; 128 at 65,536 tokens"
    assert f"\nQuestions of each task: {said}.\nX, torch 2, Python 3.12.3, commit abc, 2026-11-23.\n" in card
    assert all(f"| {stage.length:,} | {stage.rows} | {stage.steps:,} |" in card for stage in FULL.stages)
    assert "{" not in card and max(map(len, card.splitlines())) < 125


def test_a_table_for_each_model_and_the_shipped_one_is_marked() -> None:
    facts = {"kind": "needle", "seed": 0, "gpu": "X", "torch": "2", "commit": "abc", "date": "2026-11-23"}
    cells = [("vt", 4096, 512, 0.5), ("vt", 8192, 128, 0.25), ("single", 4096, 512, 1.0), ("vt", 4096, 512, 0.75)]
    rows = [
        {"task": task, "length": length, "samples": samples, "exact": exact, "model_sha256": model, **facts}
        for model in ("f" * 64, model_sha256(MODEL_DIR))
        for task, length, samples, exact in cells
    ]
    shipped, other = run_tables(rows).split("\n\n**")
    assert "| vt | 0.750 | 0.250 |" in other and "| single | 1.000 | - |" in other
    assert "ffffffffff" in other and "bench/needle/model" not in other
    assert "512 at 4,096 tokens; 128 at 8,192 tokens. X, torch 2, commit abc" in other
    assert "(`bench/needle/model`)" in shipped and "| vt | 0.750 | 0.250 |" in shipped
