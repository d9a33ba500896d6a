"""The needle model's accuracies: how answers are counted, and how the tables tell them."""

from __future__ import annotations

import pytest
import torch
from needle_runs import CPU, TINY
from torch import nn

from bench.needle.batches import Batch, Builder
from bench.needle.corpus import Corpus
from bench.needle.evaluate import measure, predictions
from bench.needle.network import make_network
from bench.needle.settings import FULL
from bench.needle.tables import conditions_of, questions_of, run_tables
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import EVALUATED

pytestmark = pytest.mark.usefixtures("one_thread")


def test_predictions_are_greedy_decoding(corpus: Corpus) -> None:
    """Of a network that says something else at every place, from the tokens before the place alone."""
    network = make_network(TINY.config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    builder = Builder(corpus.tokenizer, corpus.tokens, CPU)
    batch = builder.build(2, 450, EVALUATED["multiquery"], torch.Generator().manual_seed(0), questions_last=True)
    with torch.no_grad():
        said = predictions(network, batch)
        assert said.shape == batch.places.shape
        for tokens, places, words in zip(batch.tokens, batch.places, said, strict=True):
            assert len(set(words.tolist())) > 20
            for place, word in zip(places, words, strict=True):
                assert word == network(tokens[None, :place]).logits[0, -1].argmax()


@pytest.mark.parametrize(
    ("wrong", "exact"),
    [("digit", 3 / 4), ("word", 3 / 4), ("end", 1.0)],
)
def test_an_answer_counts_where_all_of_it_is_right(
    wrong: str, exact: float, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token of one of four answers is wrong: a digit of its numbers, a word between them, or what ends it."""

    def all_but_one(network: nn.Module, batch: Batch) -> torch.Tensor:
        filled = batch.weights == 1
        at = {"digit": filled & batch.scored, "word": ~filled & batch.scored, "end": ~batch.scored}[wrong]
        said = batch.targets
        said[2, at.nonzero()[0]] += 1
        return said

    monkeypatch.setattr("bench.needle.evaluate.predictions", all_but_one)
    found = measure(make_network(TINY.config), Builder(corpus.tokenizer, corpus.tokens, CPU), "multivalue", 700, 4, 0)
    assert found == {"task": "multivalue", "length": 700, "samples": 4, "exact": exact}


def test_each_question_is_another(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in batches of two, of which the last is smaller; the same seed asks the same."""
    asked: list[tuple[int, ...]] = []

    def noting(network: nn.Module, batch: Batch) -> torch.Tensor:
        assert batch.tokens.shape[0] <= 2
        asked.extend(map(tuple, batch.tokens.tolist()))
        return batch.targets

    monkeypatch.setattr("bench.needle.evaluate._TOKENS_AT_ONCE", 1500)
    monkeypatch.setattr("bench.needle.evaluate.predictions", noting)
    network, builder = make_network(TINY.config), Builder(corpus.tokenizer, corpus.tokens, CPU)
    for seed in (0, 1, 0):
        assert measure(network, builder, "vt", 700, 5, seed)["exact"] == 1
    assert len(set(asked[:10])) == 10
    assert asked[10:] == asked[:5]


def test_how_many_questions_each_length_had() -> None:
    rows = [{"task": task, "length": goal.length, "samples": goal.samples} for goal in FULL.goals for task in EVALUATED]
    said = "512 at 4,096, 8,192, 16,384 tokens; 256 at 32,768 tokens; 128 at 65,536 tokens"
    assert questions_of(rows) == said


def test_conditions_that_differ_are_all_named() -> None:
    first = {"gpu": "X", "torch": "2", "python": "3.12.3", "commit": "abc", "date": "2026-11-23"}
    rows = [first, {**first, "commit": "def", "date": "2026-11-24"}, first]
    assert conditions_of(rows) == "X, torch 2, Python 3.12.3, commit abc, def, 2026-11-23, 2026-11-24"
    assert conditions_of([{"gpu": None, "torch": "2"}]) == "torch 2"


def test_a_table_for_each_model_and_the_shipped_one_is_marked() -> None:
    facts = {"kind": "needle", "seed": 0, "gpu": "X", "torch": "2", "commit": "abc", "date": "2026-11-23"}
    cells = [("vt", 4096, 512, 0.5), ("vt", 8192, 128, 0.25), ("single", 4096, 512, 1.0), ("vt", 4096, 512, 0.75)]
    rows = [
        {"task": task, "length": length, "samples": samples, "exact": exact, "model_sha256": model, **facts}
        for model in ("f" * 64, model_sha256(MODEL_DIR))
        for task, length, samples, exact in cells
    ]
    shipped, other = run_tables(rows).split("\n\n**SHA")
    assert "| vt | 0.750 | 0.250 |" in other and "| single | 1.000 | - |" in other
    assert "ffffffffff" in other and "flexprefill_fa/tools/needle/model" not in other
    assert "512 at 4,096 tokens; 128 at 8,192 tokens." in other and "X, torch 2, commit abc" in other
    assert "It is `flexprefill_fa/tools/needle/model`." in shipped and "| vt | 0.750 | 0.250 |" in shipped


CELL = {"task": "vt", "length": 700, "samples": 8, "exact": 0.25, "commit": "abc", "date": "2026-11-23"}
SAME = {"model_sha256": "f" * 64, "asked_sha256": "a", "seed": 0, "gpu": "X", "torch": "2", "python": "3.12.3"}


@pytest.mark.parametrize("name", SAME)
def test_rows_of_other_conditions_are_another_table(name: str) -> None:
    other = {**SAME, name: 1 if name == "seed" else "e" * 64}
    rows = [{**CELL, **SAME}, {**CELL, **other, "exact": 0.5}]
    both = run_tables(rows)
    assert both.count("**SHA-256 ") == 2 and "| vt | 0.250 |" in both and "| vt | 0.500 |" in both
    assert run_tables([rows[0], {**rows[1], name: SAME[name]}]).count("**SHA-256 ") == 1
