"""Selectors on language models: KL to dense within limits, and selectors that are broken on purpose far beyond.

The needle model always; and a real one where the environment variable FLEXPREFILL_MODEL names its folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quality_regression import change_selection
from torch import Tensor

from flexprefill_fa.choice import Choice, parse_choice
from flexprefill_fa.masks import selector
from flexprefill_fa.tools.fidelity.cells import Conditions, Fidelity
from flexprefill_fa.tools.fidelity.texts import Tokens, read_tokens
from flexprefill_fa.tools.fidelity.trial import Trial
from flexprefill_fa.tools.loading import load_model
from flexprefill_fa.tools.needle import MODEL_DIR

VARIABLE = "FLEXPREFILL_MODEL"
CPU = torch.device("cpu")
LITTLE = "sink_blocks=1+window_blocks=1+last_full_blocks=0"  # of what is kept in any case
CHUNK = 1024 - 64  # begins and ends inside a block
SLOW = 3600  # seconds: a real model on a CPU that others use too
WORSE = 3
"""KL of a broken selector / KL of the whole one, at least."""


# Density and KL at most: twice or more of what SmolLM2-135M-Instruct gave, because other models are other.
LIMITS = {
    f"flashprefill:alpha=0.05+{LITTLE}": (0.75, 0.05),  # 0.644, 0.014
    "flexprefill:gamma=0.95+min_budget=512": (0.7, 0.3),  # 0.514, 0.131
    "streaming_llm:window=1024": (0.66, 0.15),  # 0.650 (geometry alone), 0.040
    "vertical_slash:vertical_size=512+slash_size=512": (0.45, 0.6),  # 0.318, 0.271
}


@dataclass(frozen=True)
class Subject:
    """A model and the source code that it reads."""

    model: Any
    folder: Path
    text: Tokens
    length: int

    def kl(self, choice: Choice, chunk: int | None = None) -> Trial:
        conditions = Conditions(skip=512, chunk=chunk, recall=False)
        runner = Fidelity(self.model, self.folder, "model", [self.text], conditions, [], lambda row: None)
        return runner.measure(choice, self.length)


def subject(folder: Path, length: int) -> Subject:
    model, tokenizer = load_model(folder, torch.float32, CPU)
    return Subject(model, folder, read_tokens(tokenizer, (), length)[0], length)


@pytest.fixture(scope="module")
def needle() -> Subject:
    return subject(MODEL_DIR, 1536)


@pytest.fixture(scope="module")
def real() -> Subject:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to the folder of a language model to check selectors on it")
    return subject(Path(folder), 3072)


def shift_keys(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    """Let a selector take each block's pooled key for the next block's."""
    whole: Any = selector.select_plain

    def shifted(query: Tensor, key: Tensor, *arguments: Any) -> Any:
        return whole(query, key.roll(config.block_size, 2), *arguments)

    monkeypatch.setattr(selector, "select_plain", shifted)


def no_diagonal_in_chunks(keep: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Rows of a chunk behind a cached prefix without the blocks that hold their own positions."""
    offset, size = key.shape[2] - query.shape[2], 128
    if offset == 0:
        return keep
    first = offset + size * torch.arange(keep.shape[2])[:, None]
    block = torch.arange(keep.shape[3])
    own = (block >= first // size) & (block <= (first + size - 1) // size)
    return keep & ~own


def check_pooled_keys(model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = parse_choice(f"flashprefill:alpha=0.1+{LITTLE}")
    whole = model.kl(choice)
    assert whole.kl > 0 and whole.density < 0.8
    shift_keys(monkeypatch, choice.config)
    broken = model.kl(choice)
    assert broken.kl >= WORSE * whole.kl, (whole, broken)


def check_chunks(model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = parse_choice("flashprefill:alpha=0.1")
    whole, chunks = model.kl(choice), model.kl(choice, CHUNK)
    assert whole.kl > 0 and 0 < chunks.kl < WORSE * whole.kl
    change_selection(monkeypatch, choice.config, no_diagonal_in_chunks)
    assert model.kl(choice).kl == whole.kl, "a text in one piece has no such chunk"
    broken = model.kl(choice, CHUNK)
    assert broken.kl >= WORSE * chunks.kl, (chunks, broken)


def test_pooled_keys_one_block_off_are_seen(needle: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pooled_keys(needle, monkeypatch)


def test_a_chunk_without_its_diagonal_is_seen(needle: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks(needle, monkeypatch)


@pytest.mark.timeout(SLOW)
def test_pooled_keys_one_block_off_are_seen_on_a_real_model(real: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    check_pooled_keys(real, monkeypatch)


@pytest.mark.timeout(SLOW)
def test_a_chunk_without_its_diagonal_is_seen_on_a_real_model(real: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    check_chunks(real, monkeypatch)


@pytest.mark.timeout(SLOW)
@pytest.mark.parametrize("name", LIMITS)
def test_a_real_model_stays_near_dense(real: Subject, name: str) -> None:
    most_density, most_kl = LIMITS[name]
    found = real.kl(parse_choice(name))
    assert found.density <= most_density and 0 < found.kl <= most_kl, found
