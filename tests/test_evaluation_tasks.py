"""RULER's offline tasks: exact budgets for different tokenizers, fair questions, RULER's numbers and its score."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import pytest

from flexprefill_fa.tools.evaluation.budget import BudgetError, CountTokens, Recipe, Sample, fit
from flexprefill_fa.tools.evaluation.ruler import RECIPES, Niah, score
from flexprefill_fa.tools.needle import text_tasks
from flexprefill_fa.tools.needle.formats import EVALUATED
from flexprefill_fa.tools.needle.questions import draw

if TYPE_CHECKING:
    from tokenizers import Tokenizer


ALL: dict[str, Recipe] = {**RECIPES, **{f"needle_{name}": recipe for name, recipe in text_tasks.TASKS.items()}}


def characters(samples: list[Sample]) -> list[int]:
    return [len(sample.text) for sample in samples]


def pieces(samples: list[Sample]) -> list[int]:
    """Words of up to four letters, and every other sign, as a byte-pair tokenizer may cut."""
    return [len(re.findall(r" ?\w{1,4}|\s|[^\w\s]", sample.text)) for sample in samples]


@pytest.fixture(params=["characters", "pieces", "needle model"])
def count(request: pytest.FixtureRequest, needle_tokenizer: Tokenizer) -> CountTokens:
    def tokens(samples: list[Sample]) -> list[int]:
        return [len(encoding.ids) for encoding in needle_tokenizer.encode_batch([sample.text for sample in samples])]

    return {"characters": characters, "pieces": pieces, "needle model": tokens}[request.param]


@pytest.mark.parametrize("name", ALL)
def test_prompt_and_answer_take_exactly_the_budget(name: str, count: CountTokens) -> None:
    recipe = ALL[name]
    for length, samples in ((8192, 2), (9345, 1)):
        for sample, tokens in fit(recipe, count, length, samples=samples, seed=1):
            assert tokens == count([sample])[0] == length - recipe.new_tokens


@pytest.mark.parametrize("name", ALL)
def test_what_is_asked_does_not_depend_on_the_length(name: str) -> None:
    short, long = (fit(ALL[name], pieces, length, samples=2, seed=3) for length in (8192, 16384))
    if name != "fwe":  # its vocabulary grows with the length
        assert [sample.outputs for sample, _ in short] == [sample.outputs for sample, _ in long]
    assert fit(ALL[name], pieces, 8192, samples=2, seed=3) == short
    assert fit(ALL[name], pieces, 8192, samples=1, seed=3) == short[:1]
    assert fit(ALL[name], pieces, 8192, samples=1, seed=4) != short[:1]


@pytest.mark.parametrize("name", ALL)
def test_answers_are_in_the_prompt_and_not_given_away(name: str) -> None:
    for sample, _ in fit(ALL[name], pieces, 8192, samples=3, seed=0):
        outputs = list(sample.outputs)
        if name.startswith("needle_"):  # one answer, with words around its names and numbers
            (answer,) = outputs
            outputs = re.findall(r"#\w+", answer) if name == "needle_vt" else re.findall(r"\d{7}", answer)
        assert score(sample.prompt, outputs) == 1
        question = sample.text.splitlines()[-1]
        assert score(question, outputs) == 0
        assert len(set(outputs)) == len(outputs)


def test_needles_lie_anywhere() -> None:
    depths = []
    for sample, _ in fit(text_tasks.TASKS["single"], pieces, 8192, samples=40, seed=0):
        depths.append(sample.prompt.index(f" is {sample.outputs[0]}.") / len(sample.prompt))
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_a_budget_too_small_names_the_least() -> None:
    with pytest.raises(BudgetError, match=r"length must be at least (\d+) tokens .* got 200") as caught:
        fit(RECIPES["niah_single_1"], pieces, 200, samples=1, seed=0)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert fit(RECIPES["niah_single_1"], pieces, least, samples=1, seed=0)


def test_parameters_are_those_that_ruler_publishes() -> None:
    draw = {name: recipe.draw(500, "", random.Random(0), 8192) for name, recipe in RECIPES.items()}
    prompts = {name: sample.prompt for name, sample in draw.items()}
    needle = r"One of the special magic \w+ for (\S+) is: (\S+)\."
    assert len(re.findall(needle, prompts["niah_single_1"])) == 1
    assert len(re.findall(needle, prompts["niah_multikey_2"])) == 501
    assert len(re.findall(needle, prompts["niah_multikey_3"])) == 501
    assert all(len(key) == len(value) == 36 for key, value in re.findall(needle, prompts["niah_multikey_3"]))
    values = re.findall(needle, prompts["niah_multivalue"])
    assert len(values) == 4 and len({key for key, _ in values}) == 1
    queries = re.findall(needle, prompts["niah_multiquery"])
    assert len(queries) == 4 and len({key for key, _ in queries}) == 4 == len(draw["niah_multiquery"].outputs)

    example, tracking = prompts["vt"].split("\n\nMemorize")
    assert len(re.findall(r"VAR [A-Z]{3} = ", example)) == 5 and len(re.findall(r"VAR [A-Z]{5} = ", tracking)) == 5
    assert len(re.findall(r"VAR [A-Z]{5} = \d{5}\n", tracking)) == 1 and len(draw["vt"].outputs) == 5

    listed = prompts["cwe"].split("\n")[4]  # after the example's three lines and this question's first
    words = re.findall(r"\d+\. (\S+)", listed)
    counts = {word: words.count(word) for word in set(words)}
    assert sorted(counts, key=lambda word: -counts[word])[:10] and set(draw["cwe"].outputs) == {
        word for word, times in counts.items() if times == 30
    }
    assert set(counts.values()) == {30, 3} and len(counts) == 510

    coded = [word for word in prompts["fwe"].split("words. ")[1].split("\nQuestion")[0].split() if word != "..."]
    assert [len(word) for word in coded] == [6] * len(coded)
    ranked = sorted(set(coded), key=lambda word: -coded.count(word))
    assert tuple(ranked[:3]) == draw["fwe"].outputs
    # Ranks 2, 3 and 4 of a zeta distribution with exponent 2.
    assert [coded.count(word) for word in ranked[:3]] == [int(500 / rank**2 / 1.6449340668) for rank in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("They are ABC and def.", 1.0), ("abc", 0.5), ("", 0.0), ("ab cd ef", 0.0)],
)
def test_score_is_the_share_of_outputs_found_in_any_case(text: str, expected: float) -> None:
    assert score(text, ["abc", "DEF"]) == expected


@pytest.mark.parametrize("task", EVALUATED)
def test_a_needle_answer_is_right_as_a_whole(task: str) -> None:
    names = [f"#{first}{second}{end}" for first in "abcdefgh" for second in "abcde" for end in ("open", "opened")]
    for seed in range(20):
        question = draw(EVALUATED[task], names, random.Random(seed))
        assert exact(question.answer, question.answer) == 1
        assert exact(question.answer[:-1], question.answer) == 0


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("0123456", "0123456", 1),
        (" 0123456\n", "0123456", 1),
        ("0123457", "0123456", 0),
        ("01234567", "0123456", 0),
        ("0123456.", "0123456", 0),
        ("", "0123456", 0),
        ("0123456, 2 for #key is 7654321", "0123456, 2 for #key is 7654321", 1),
        ("0123456, 2 for #other is 7654321", "0123456, 2 for #key is 7654321", 0),
        ("0123456, 3 for #key is 7654321", "0123456, 2 for #key is 7654321", 0),
        ("7654321, 2 for #key is 0123456", "0123456, 2 for #key is 7654321", 0),
        ("#open, #closed", "#open, #closed", 1),
        ("#opened, #closed", "#open, #closed", 0),
        ("#open", "#open, #closed", 0),
        ("#closed, #open", "#open, #closed", 0),
    ],
)
def test_a_needle_answer_counts_as_a_whole(text: str, answer: str, expected: float) -> None:
    assert exact(text, answer) == expected


def exact(text: str, answer: str) -> float:
    (score,) = text_tasks.process_results({"outputs": [answer]}, [text]).values()
    return score


def test_needles_in_one_line_of_haystack_are_all_hidden() -> None:
    sample = Niah("noise", keys_hidden=4, keys_asked=4).draw(4, "", random.Random(0), 4096)
    assert len(sample.outputs) == 4 and score(sample.prompt, list(sample.outputs)) == 1
