"""The needle model's corpus: the same each time, apart from what is held out, and enough for every stage."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from needle_runs import CPU, FILES, least_length

from bench.needle.batches import Builder
from bench.needle.prepare import Corpus, build_corpus, load_corpus
from bench.needle.settings import FULL
from flexprefill_fa.tools.needle.prompts import key_words

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_corpus_is_the_same_each_time_and_apart_from_what_is_held_out(corpus: Corpus, tmp_path: Path) -> None:
    again = build_corpus(tmp_path, files=FILES)
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.held_out, corpus.held_out)
    for name in ("tokenizer.json", "tokenizer_config.json", "text.npz"):
        assert (tmp_path / name).read_bytes() == (corpus.folder / name).read_bytes()
    assert corpus.held_out[:200].tobytes() not in corpus.train.tobytes()
    assert len(key_words(corpus.tokenizer)) == 512


def test_a_corpus_is_read_back_whole(corpus: Corpus) -> None:
    again = load_corpus(corpus.folder)
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.held_out, corpus.held_out)


def test_the_tasks_words_are_single_tokens(corpus: Corpus) -> None:
    text = "\nQuestion: which variables hold the special magic numbers? Answer: VAR"
    assert len(corpus.tokenizer.encode(text).ids) == len(re.findall(r"\n| ?\w+|\S", text))


def test_what_a_stage_trains_on_fits_its_sequences(corpus: Corpus) -> None:
    builder = Builder(corpus.tokenizer, corpus.train, CPU)
    for stage in FULL.stages:
        assert stage.rows % len(stage.mixes_at(0)) == 0
        for mix in (mix for step in range(3) for mix, _ in stage.mixes_at(step)):
            assert mix.names <= 512
            assert least_length(builder, mix) < 0.97 * stage.length
