"""The needle task: exact length, the phrases the model was trained on, and answers it can find."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, build_prompt, is_correct, key_words
from flexprefill_fa.tools.needle.source import ascii_text, held_out_files


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.mark.parametrize("tokens", [129, 1000, 1024, 4097])
@pytest.mark.parametrize("needles", [1, 3])
def test_prompt_is_token_exact_and_holds_every_needle(tokenizer: Tokenizer, tokens: int, needles: int) -> None:
    prompt = build_prompt(tokenizer, tokens, needles=needles, seed=tokens)
    text = tokenizer.decode(prompt.token_ids)
    assert len(prompt.token_ids) == tokens
    assert len(prompt.needles) == len(prompt.positions) == needles
    assert prompt.needles[prompt.key] == prompt.answer
    assert prompt.positions == sorted(set(prompt.positions))
    for (key, number), position in zip(prompt.needles.items(), prompt.positions, strict=True):
        assert len(number) == ANSWER_DIGITS and number.isdigit()
        assert tokenizer.encode(key).ids == [tokenizer.token_to_id(key)]
        statement = f"\nThe special magic number for {key} is {number}.\n"
        ids = tokenizer.encode(statement).ids
        assert prompt.token_ids[position : position + len(ids)] == ids
        assert statement in text
    question = (
        f"what is the special magic number for {prompt.key}? Answer: the special magic number for {prompt.key} is "
    )
    assert text.endswith("\nQuestion: " + question)


def test_prompt_is_python_source_without_repetition(tokenizer: Tokenizer) -> None:
    prompt = build_prompt(tokenizer, 8192, needles=1)
    text = tokenizer.decode(prompt.token_ids)
    assert all(word in text for word in ("def ", "import ", "return"))
    windows = {tuple(prompt.token_ids[start : start + 256]) for start in range(0, 8192 - 256, 256)}
    assert len(windows) == len(range(0, 8192 - 256, 256))


def test_same_seed_same_prompt_other_seed_other_prompt(tokenizer: Tokenizer) -> None:
    assert build_prompt(tokenizer, 512, seed=3) == build_prompt(tokenizer, 512, seed=3)
    assert build_prompt(tokenizer, 512, seed=3).token_ids != build_prompt(tokenizer, 512, seed=4).token_ids


def test_needles_that_do_not_fit_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ to hold 8 needles"):
        build_prompt(tokenizer, 100, needles=8)
    with pytest.raises(ValueError, match="needles must be at least 1, got 0"):
        build_prompt(tokenizer, 1000, needles=0)
    with pytest.raises(ValueError, match="needles must be at most 512"):
        build_prompt(tokenizer, 10**6, needles=len(key_words(tokenizer)) + 1)


def test_the_named_least_length_is_enough(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError) as refused:
        build_prompt(tokenizer, 1, needles=2)
    least = int(str(refused.value).split()[5])
    assert len(build_prompt(tokenizer, least, needles=2).token_ids) == least
    with pytest.raises(ValueError):
        build_prompt(tokenizer, least - 1, needles=2)


def test_the_text_is_what_the_model_was_not_trained_on(tokenizer: Tokenizer) -> None:
    """Of a prompt's text without its needles, every line stands in a held-out file."""
    held_out = "".join(map(ascii_text, held_out_files()))
    prompt = build_prompt(tokenizer, 30_000, needles=1)
    before = tokenizer.decode(prompt.token_ids[: prompt.positions[0]])
    behind = tokenizer.decode(prompt.token_ids[prompt.positions[0] :]).split(".\n", 1)[1].split("\nQuestion: ")[0]
    lines = [*before.split("\n"), *behind.split("\n")]
    assert len(lines) > 1000
    assert [line for line in lines if line not in held_out] == []


def test_more_tokens_than_the_held_out_text_are_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the held-out text of this Python holds \d{6} tokens, \d{7} are needed"):
        build_prompt(tokenizer, 2 * 10**6)
    monkeypatch.setattr("flexprefill_fa.tools.needle.prompts.held_out_files", lambda: ())
    with pytest.raises(ValueError, match="the held-out text of this Python holds 0 tokens"):
        build_prompt(tokenizer, 1000)


@pytest.mark.parametrize(
    ("text", "correct"),
    [("0123456", True), (" 0123456\n", True), ("123456", False), ("0123456.", False), ("01234567", False), ("", False)],
)
def test_scoring_is_exact_match(text: str, correct: bool) -> None:
    assert is_correct(text, "0123456") is correct


def test_dense_model_answers(tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, attn_implementation="sdpa")
    prompts = [build_prompt(tokenizer, 1024, needles=4, seed=seed) for seed in range(4)]
    input_ids = torch.tensor([prompt.token_ids for prompt in prompts])
    output = model.generate(input_ids, max_new_tokens=ANSWER_DIGITS, do_sample=False)
    answers = [tokenizer.decode(row.tolist()) for row in output[:, 1024:]]
    assert [is_correct(answer, prompt.answer) for answer, prompt in zip(answers, prompts, strict=True)] == [True] * 4
