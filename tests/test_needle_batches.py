"""The needle tasks as tensors: the tokens of the text recipes, true answers, source that runs on around them."""

from __future__ import annotations

import functools
import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from needle_runs import least_length

from bench.needle.batches import TASKS, Builder
from bench.needle.corpus import encode, train_tokenizer
from flexprefill_fa.tools.evaluation.budget import fit
from flexprefill_fa.tools.needle import text_tasks
from flexprefill_fa.tools.needle.formats import ANSWER_DIGITS, EVALUATED, Form, Mix, all_forms, lay_out
from flexprefill_fa.tools.needle.prompts import key_words
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files, is_held_out, source_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EVERYTHING = Mix(needles=6, asked=3, queries=2, lists=3, lists_asked=2, chains=3, chains_asked=2, several=3)


@pytest.fixture(scope="module")
def text(needle_tokenizer: Tokenizer) -> np.ndarray:
    return encode(needle_tokenizer, [ascii_text(file) for file in held_out_files()[:4]])


@pytest.fixture(scope="module")
def builder(needle_tokenizer: Tokenizer, text: np.ndarray) -> Builder:
    return Builder(needle_tokenizer, text, torch.device("cpu"))


@pytest.mark.parametrize("form", all_forms(), ids=range(len(all_forms())))
def test_a_forms_tokens_are_those_of_its_text(form: Form, needle_tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    layout = lay_out(form, needle_tokenizer)
    names = rng.sample(key_words(needle_tokenizer), layout.names)
    whole = form.prompt + form.answer + form.end
    count = len(set(re.findall(r"number\[\d\]", whole)))
    numbers = [f"{rng.randrange(10**form.digits):0{form.digits}d}" for _ in range(count)]
    fills = [needle_tokenizer.token_to_id(name) for name in (*names, *"".join(numbers))]
    tokens = [fills[hole] if hole >= 0 else word for word, hole in zip(layout.literals, layout.holes, strict=True)]
    assert tokens == needle_tokenizer.encode(whole.format(name=names, number=numbers)).ids
    assert tokens[: layout.answer] == needle_tokenizer.encode(form.write(names, numbers)).ids
    assert max(layout.holes) == len(fills) - 1


def wrong_answers(text: str) -> list[str]:
    """Questions in a text whose answers are not what the text before them says."""
    wrong = []
    asked = 0
    for match in re.finditer(r"Question: (.*?)\? Answer: (.*?)\.\n", text):
        question, answer = match.groups()
        before = text[: match.start()]
        known = dict(re.findall(r"\nThe special magic number for (#\w+?) is (\d{7})\.\n", before))
        found = re.findall(r"for (#\w+?) is (\d{7})", answer)
        numbered = {
            (key, int(place)): number
            for place, key, number in re.findall(r"\nThe special magic number (\d) for (#\w+?) is (\d{7})\.\n", before)
        }
        asked += 1
        if "variables" in question:
            value = question.split()[-1]
            names = re.findall(r"#\w+", answer)
            links = [f"\nVAR {names[0]} = {value}\n", *(f"\nVAR {b} = VAR {a}\n" for a, b in pairwise(names))]
            places = [before.find(link) for link in links]
            right = len(names) == 5 and -1 not in places and places == sorted(places)
        elif count := re.match(r"what are the (\d) special", question):
            expected = [(place + 1, number) for place, (_, number) in enumerate(found)]
            right = len(found) == int(count[1]) and all(
                numbered.get((found[0][0], place)) == number for place, number in expected
            )
        else:
            keys = re.findall(r"#\w+", question)
            right = found == [(key, known.get(key)) for key in keys]
        if not right:
            wrong.append(match[0])
    assert asked
    return wrong


@pytest.mark.parametrize("several", [2, 3, 4])
def test_answers_are_what_the_text_before_them_says(
    builder: Builder, needle_tokenizer: Tokenizer, several: int
) -> None:
    mix = Mix(6, 3, 2, 3, 2, 3, 2, several)
    batch = builder.build(4, 1800, mix, torch.Generator().manual_seed(several))
    assert batch.tokens.shape == (4, 1800)
    texts = [needle_tokenizer.decode(row.tolist()) for row in batch.tokens]
    for row in texts:
        assert wrong_answers(row) == []
        assert len(re.findall("Question: ", row)) == 3 + 2 + 2 + 2
        assert len(re.findall("\nThe special magic number", row)) == 6 + 3 * several
        assert len(re.findall("\nVAR ", row)) == 3 * 5
    assert len(set(texts)) == 4
    # A number changed in a question's answer is noticed.
    answer = re.search(r"Answer: the special magic number for #\w+ is (\d)", texts[0])
    assert answer is not None
    place = answer.start(1)
    assert len(wrong_answers(texts[0][:place] + str((int(texts[0][place]) + 1) % 10) + texts[0][place + 1 :])) == 1


def test_places_are_those_of_the_answers(builder: Builder, needle_tokenizer: Tokenizer) -> None:
    batch = builder.build(2, 1800, EVERYTHING, torch.Generator().manual_seed(1))
    digits = {needle_tokenizer.token_to_id(str(digit)) for digit in range(10)}
    names = {needle_tokenizer.token_to_id(name) for name in key_words(needle_tokenizer)}
    counted = {TASKS[task]: len(columns) for task, columns in batch.columns}
    assert counted == {
        "multikey": 3 * (7 + 2),
        "multivalue": 2 * (3 * 7 + 2 * 8 + 2),
        "multiquery": 2 * (3 * 7 + 2 * 6 + 2),
        "vt": 2 * (5 + 4 * 2 + 2),
    }
    holes = batch.weights == 1
    for row, targets in enumerate(batch.targets):
        assert set(targets[holes].tolist()) <= digits | names
        answers = needle_tokenizer.decode(targets.tolist())
        assert len(re.findall(r"\.\n", answers)) == 3 + 2 + 2 + 2
        assert "." not in needle_tokenizer.decode(targets[batch.scored].tolist())
        # Every single question's number is also the one that follows its words in the text.
        first = batch.places[row, 0].item()
        words = needle_tokenizer.decode(batch.tokens[row, first - 9 : first].tolist())
        assert re.search(r" magic number for #\w+ is $", words)


def test_source_runs_on_around_what_is_hidden(builder: Builder, text: np.ndarray) -> None:
    batch = builder.build(3, 1800, EVERYTHING, torch.Generator().manual_seed(2))
    everything = text.tobytes()
    for tokens, source in zip(batch.tokens, batch.source, strict=True):
        run = tokens[source].numpy().astype(np.uint16)
        assert len(run) == 1800 - least_length(builder, EVERYTHING) + 1
        assert run.tobytes() in everything
        changes = (source[1:] != source[:-1]).sum()
        assert changes > 20, "statements lie in one heap"


def test_same_generator_same_batch(builder: Builder) -> None:
    first, again, other = (
        builder.build(2, 1800, EVERYTHING, torch.Generator().manual_seed(seed)).tokens for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("task", EVALUATED)
def test_an_evaluation_ends_with_its_one_question(builder: Builder, needle_tokenizer: Tokenizer, task: str) -> None:
    batch = builder.build(2, 1200, EVALUATED[task], torch.Generator().manual_seed(3), questions_last=True)
    for tokens, places in zip(batch.tokens, batch.places, strict=True):
        text = needle_tokenizer.decode(tokens.tolist())
        assert wrong_answers(text) == []
        assert len(re.findall("Question: ", text)) == 1
        assert places.tolist() == list(range(1200 - len(places), 1200))
        mentioned = needle_tokenizer.decode(tokens[places[0] - 90 :].tolist())
        assert "Question: " in mentioned


def test_several_questions_come_behind_all_statements(builder: Builder, needle_tokenizer: Tokenizer) -> None:
    batch = builder.build(3, 1800, EVERYTHING, torch.Generator().manual_seed(4), questions_last=True)
    for tokens in batch.tokens:
        text = needle_tokenizer.decode(tokens.tolist())
        assert wrong_answers(text) == []
        before, *questions = text.split("\nQuestion: ")
        assert len(questions) == 3 + 2 + 2 + 2 and questions[-1].endswith(".\n")
        assert not any(re.search(r"\nVAR |\nThe special magic", question) for question in questions)
        assert len(re.findall("\nThe special magic number", before)) == 6 + 3 * 3


STATEMENT = r"\nThe special magic number (?:\d )?for #\w+? is \d{7}\.\n|\nVAR #\w+ = (?:VAR #\w+|\d{5})\n"


def neighbours(text: str) -> float:
    """The share of a text's statements that stand directly behind another."""
    spans = [match.span() for match in re.finditer(STATEMENT, text)]
    ends = {end for _, end in spans}
    return sum(start in ends for start, _ in spans) / len(spans)


def test_heaped_statements_stand_together_at_a_few_places(builder: Builder, needle_tokenizer: Tokenizer) -> None:
    def build(rows: int, heaped: float) -> list[str]:
        generator = torch.Generator().manual_seed(7)
        batch = builder.build(rows, 6000, EVERYTHING, generator, questions_last=True, heaped=heaped)
        assert batch.places.amax(1).tolist() == [5999] * rows
        return [needle_tokenizer.decode(row.tolist()) for row in batch.tokens]

    for text in build(6, 1.0):
        assert wrong_answers(text) == []
        assert len(re.findall(STATEMENT, text)) == 6 + 3 * 3 + 3 * 5
        assert neighbours(text) > 0.6
        statements, *questions = text.split("\nQuestion: ")
        assert len(questions) == 3 + 2 + 2 + 2 and questions[-1].endswith(".\n")
        assert not any(re.search(STATEMENT, question) for question in questions)
        assert 2 <= len(re.split(f"(?:{STATEMENT})+", statements)) - 1 <= 9, "places with statements"
    assert max(neighbours(text) for text in build(6, 0.0)) < 0.2
    shares = [neighbours(text) for text in build(60, 0.5)]
    assert all(share < 0.2 or share > 0.6 for share in shares), "a sequence is heaped or not"
    assert 20 <= sum(share > 0.6 for share in shares) <= 40


@pytest.fixture(scope="module")
def trained_tokenizer() -> Tokenizer:
    """As the recipe makes it, of a part of the files."""
    return train_tokenizer([ascii_text(file) for file in source_files() if not is_held_out(file)][:12])


@pytest.fixture
def recipe_names(trained_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text recipes with the names of that tokenizer, whichever model there is."""
    monkeypatch.setattr(text_tasks, "_names", lambda: tuple(key_words(trained_tokenizer)))


def texts_of(task: str, tokenizer: Tokenizer, length: int, samples: int) -> list[str]:
    """A text recipe's prompts, of exactly the tokens that were asked for."""
    recipe = text_tasks.TASKS[task]

    def count(samples: list) -> list[int]:
        return [len(tokenizer.encode(sample.text).ids) for sample in samples]

    found = fit(recipe, count, length, samples, 0)
    assert [tokens for _, tokens in found] == [length - recipe.new_tokens] * samples
    assert count([sample for sample, _ in found]) == [length - recipe.new_tokens] * samples
    for sample, _ in found:
        (answer,) = sample.outputs
        assert wrong_answers(f"{sample.text}{answer}.\n") == []
        haystack = re.sub(STATEMENT, "", sample.text[: sample.text.rindex("\nQuestion: ")])
        _, *lines = haystack.splitlines()  # filler stands before the first
        assert {line.strip() for line in lines} - {""} <= held_out_lines()
    return [sample.text for sample, _ in found]


@functools.cache
def held_out_lines() -> set[str]:
    return {line.strip() for file in held_out_files() for line in ascii_text(file).splitlines()}


@pytest.mark.usefixtures("recipe_names")
@pytest.mark.parametrize("task", EVALUATED)
def test_the_text_recipe_says_it_in_the_same_tokens(trained_tokenizer: Tokenizer, task: str) -> None:
    builder = Builder(
        trained_tokenizer,
        encode(trained_tokenizer, [ascii_text(file) for file in held_out_files()[:4]]),
        torch.device("cpu"),
    )
    batch = builder.build(1, 1200, EVALUATED[task], torch.Generator().manual_seed(3), questions_last=True)
    assert int(batch.scored.sum()) == text_tasks.TASKS[task].new_tokens
    drawn = re.findall(STATEMENT, trained_tokenizer.decode(batch.tokens[0].tolist()))
    for text in texts_of(task, trained_tokenizer, 3000, 2):
        statements = re.findall(STATEMENT, text)
        assert statements and len(statements) == len(drawn)
        written = ",".join(map(str, trained_tokenizer.encode(text).ids)) + ","
        for statement in statements:
            assert ",".join(map(str, trained_tokenizer.encode(statement).ids)) + "," in written, statement


@pytest.mark.usefixtures("recipe_names")
@pytest.mark.parametrize("form", ["text", "tensors"])
def test_statements_are_spread_over_the_text(trained_tokenizer: Tokenizer, form: str) -> None:
    """The 20 statements of `vt`, by the source text before each: like 20 places that chance chose."""
    samples = 24
    if form == "text":
        texts = texts_of("vt", trained_tokenizer, 3000, samples)
    else:
        source = encode(trained_tokenizer, [ascii_text(file) for file in held_out_files()[:4]])
        builder = Builder(trained_tokenizer, source, torch.device("cpu"))
        generator = torch.Generator().manual_seed(8)
        batch = builder.build(samples, 3000, EVALUATED["vt"], generator, questions_last=True)
        texts = [trained_tokenizer.decode(row.tolist()) for row in batch.tokens]
    rows = []
    for text in texts:
        pieces = [len(piece) for piece in re.split(STATEMENT, text[: text.rindex("\nQuestion: ")])]
        assert len(pieces) == 21
        rows.append(pieces)
    gaps = torch.tensor(rows).double()
    gaps /= gaps.sum(1, keepdim=True)
    places = gaps.cumsum(1)[:, :-1].mean(0)
    assert (places - torch.arange(1, 21) / 21).abs().max() < 0.1, f"mean places {places.tolist()}"
    assert np.mean([neighbours(text) for text in texts]) < 0.15
    assert gaps.max() < 0.6
    assert 0.8 < 21 * gaps.std() < 1.2  # of 20 random places 0.95; of even ones 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"several": 5}, "several must be from 2 to 4, got 5"),
        ({"needles": 3, "queries": 1}, "needles must be at least 4 for what is asked about them, got 3"),
        ({"asked": 1}, "needles must be at least 1"),
        ({"lists_asked": 1}, "lists must be at least 1"),
        ({"chains": 1, "chains_asked": 2}, "chains must be at least 2"),
    ],
)
def test_questions_about_nothing_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix(**options)


def test_what_does_not_fit_is_refused(builder: Builder, text: np.ndarray) -> None:
    least = least_length(builder, EVERYTHING)
    generator = torch.Generator()
    assert builder.build(1, least, EVERYTHING, generator).tokens.shape == (1, least)
    with pytest.raises(ValueError, match=f"length must be at least {least} tokens for this mix, got {least - 1}"):
        builder.build(1, least - 1, EVERYTHING, generator)
    with pytest.raises(ValueError, match="at most 512 names, got 600"):
        builder.build(1, 10**5, Mix(chains=120), generator)
    with pytest.raises(ValueError, match="the text must have more than"):
        builder.build(1, len(text) + 1000, Mix(needles=1, asked=1), generator)


def test_a_tenth_of_the_files_is_held_out() -> None:
    files, held = source_files(), held_out_files()
    assert set(held) < set(files)
    assert 0.05 < len(held) / len(files) < 0.15
    parts = {file: file.relative_to(files[0].parent).parts for file in files}
    kept = [file for file in files if is_held_out(file) and parts[file][0] not in ("encodings", "pydoc_data")]
    assert kept == list(held)
    folders = {part for found in parts.values() for part in found}
    assert "json" in folders and folders.isdisjoint({"test", "idlelib", "site-packages"})
    assert ANSWER_DIGITS == 7
