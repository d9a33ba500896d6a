"""The needle model's network: what is released of it, and how it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needle_runs import CPU, TINY
from safetensors.torch import load_file

from bench.needle import train
from bench.needle.batches import Builder
from bench.needle.corpus import Corpus
from bench.needle.network import export, hidden_states, logits_at, make_network
from bench.needle.settings import FULL
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.formats import Mix
from flexprefill_fa.tools.needle.prompts import key_words

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_released_folder_is_the_network_that_was_trained(corpus: Corpus, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = TINY.config | {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    network = make_network(config)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as the folder has its weights
    export(network, config, corpus.tokenizer, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.from_numpy(corpus.tokens[:300].astype(np.int64))[None]
    with torch.no_grad():
        expected = model(tokens).logits
        found = logits_at(network, hidden_states(network, tokens), torch.arange(1, 301)[None])
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    told = {name: value for name, value in config.items() if name != "dtype"}
    assert {"hidden_size", "num_key_value_heads", "rope_parameters", "rms_norm_eps"} < told.keys()
    assert {name: getattr(model.config, name) for name in told} == told
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = "def f(x):\n    return 12 #" + key_words(corpus.tokenizer)[0][1:]
    assert tokenizer(words)["input_ids"] == corpus.tokenizer.encode(words).ids
    assert tokenizer.backend_tokenizer.encode(words).ids == corpus.tokenizer.encode(words).ids
    assert tokenizer.bos_token_id == model.config.bos_token_id and tokenizer.eos_token_id == model.config.eos_token_id


def test_the_full_model_is_the_packaged_one_and_small(corpus: Corpus, tmp_path: Path) -> None:
    network = make_network(FULL.config)
    assert 2 * sum(parameter.numel() for parameter in network.parameters()) < 15e6
    export(network, FULL.config, corpus.tokenizer, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (MODEL_DIR / "config.json").read_bytes()
    made, packaged = (load_file(folder / "model.safetensors") for folder in (tmp_path, MODEL_DIR))
    assert {name: x.shape for name, x in made.items()} == {name: x.shape for name, x in packaged.items()}


def test_learning_lowers_the_loss(corpus: Corpus) -> None:
    """On the same sequences again and again, which is what the gradients of every part are for."""
    torch.manual_seed(0)
    settings = replace(TINY, config={**TINY.config, "num_hidden_layers": 1})
    network = make_network(settings.config)
    optimizer = train.make_optimizer(network, settings)
    builder = Builder(corpus.tokenizer, corpus.tokens, CPU)
    rows = [train.take_step(network, optimizer, builder, settings, 3) for _ in range(12)]
    for name in ("loss", "text", "multikey", "multivalue", "multiquery", "vt"):
        assert rows[-1][name] < 0.9 * rows[0][name], name


def test_a_steps_sequences_are_those_of_its_stage(corpus: Corpus) -> None:
    builder = Builder(corpus.tokenizer, corpus.tokens, CPU)
    number, _ = TINY.locate(2)
    open_end, closed = train.draw(builder, TINY, 2, torch.Generator().manual_seed(2))
    assert TINY.stages[number].closing and closed.tokens.shape == open_end.tokens.shape == (1, 640)
    last = closed.places.max()
    assert last == 639, "a question at the very end"
    assert {task for task, _ in closed.columns} == {0, 3}
    assert {task for task, _ in open_end.columns} == {0, 1, 2, 3}


def test_a_mix_with_few_questions_counts_as_much_as_one_with_many(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mixes with losses of one value each, whatever the network: their mean, not that of all questions."""
    builder = Builder(corpus.tokenizer, corpus.tokens, CPU)
    few, many = (
        builder.build(1, 640, Mix(needles=8, asked=asked), torch.Generator().manual_seed(asked)) for asked in (1, 7)
    )
    network = make_network(TINY.config)
    parts = tuple(torch.zeros(1, 640, TINY.config["hidden_size"]) for _ in range(2))
    values = iter((torch.full((few.targets.numel(),), 1.0), torch.full((many.targets.numel(),), 3.0)))
    monkeypatch.setattr(train.F, "cross_entropy", lambda *_, **__: next(values))
    found = train._answer_losses(network, [few, many], parts)["multikey"]
    assert found.item() == 2.0


def test_the_learning_rate_rises_holds_and_falls() -> None:
    rates = [FULL.learning_rate(step) for step in range(FULL.steps)]
    assert rates[0] == FULL.peak / FULL.warm_up and max(rates) == FULL.peak
    top = rates.index(FULL.peak)
    assert top == FULL.warm_up - 1
    assert all(after <= before for before, after in zip(rates[top:], rates[top + 1 :], strict=False))
    assert FULL.last * FULL.peak <= rates[-1] < 0.05 * FULL.peak
    assert FULL.hold == 0.35 and FULL.last == 0.03
    for number, done in enumerate((0.0, 0.16, 0.34, 0.54, 0.7, 0.85)):
        first = sum(stage.steps for stage in FULL.stages[:number])
        assert FULL.locate(first) == (number, 0)
        assert rates[max(first, top)] == pytest.approx(FULL.peak * min(1, 1 - (done - 0.35) / 0.65 * 0.97))
    with pytest.raises(ValueError, match=f"step must be below {FULL.steps}, got {FULL.steps}"):
        FULL.locate(FULL.steps)
