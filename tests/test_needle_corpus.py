"""The needle model's corpus: the same each time, apart from what is held out, and enough for every stage."""

from __future__ import annotations

import re

import numpy as np
import pytest
from needle_runs import CPU, FILES, least_length

from bench.needle.batches import Builder
from bench.needle.corpus import Corpus, build_corpus, encode
from bench.needle.settings import FULL
from flexprefill_fa.tools.needle.prompts import key_words
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_corpus_is_the_same_each_time_and_apart_from_what_is_held_out(corpus: Corpus) -> None:
    again = build_corpus(FILES)
    assert np.array_equal(again.tokens, corpus.tokens) and again.tokenizer.to_str() == corpus.tokenizer.to_str()
    held_out = encode(corpus.tokenizer, [ascii_text(file) for file in held_out_files()[:FILES]])
    assert held_out[:200].tobytes() not in corpus.tokens.tobytes()
    assert len(key_words(corpus.tokenizer)) == 512


def test_the_tasks_words_are_single_tokens(corpus: Corpus) -> None:
    text = "\nQuestion: which variables hold the special magic numbers? Answer: VAR"
    assert len(corpus.tokenizer.encode(text).ids) == len(re.findall(r"\n| ?\w+|\S", text))


def test_what_a_stage_trains_on_fits_its_sequences(corpus: Corpus) -> None:
    builder = Builder(corpus.tokenizer, corpus.tokens, CPU)
    for stage in FULL.stages:
        assert stage.rows % len(stage.mixes_at(0)) == 0
        for mix in (mix for step in range(3) for mix, _ in stage.mixes_at(step)):
            assert mix.names <= 512
            assert least_length(builder, mix) < 0.97 * stage.length
