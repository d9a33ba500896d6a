"""On a CUDA GPU with vLLM or SGLang: the engine's own server answers a streaming client with sparse prefill.

ENGINE names the engine, `vllm` or `sglang`; SOAK how many requests the soak sends, 40 where it says nothing.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Any

import pytest
from http_server import Reply, Server

from flexprefill_fa.tools.needle.prompts import NeedlePrompt, another_question, build_prompt, is_correct

ENGINE = os.environ.get("ENGINE", "vllm")
REQUESTS = int(os.environ.get("SOAK", "40"))
AT_ONCE = 16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec(ENGINE) is None, reason=f"{ENGINE} is not installed"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(ENGINE, True, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def ask(server: Server, prompts: list[NeedlePrompt], at_once: int) -> list[Reply]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: server.complete(prompt.token_ids), prompts))


def right(prompts: list[NeedlePrompt], replies: list[Reply]) -> list[bool]:
    return [is_correct(reply.text, prompt.answer) for reply, prompt in zip(replies, prompts, strict=True)]


def chunks(layers: list[dict[str, Any]]) -> int:
    """Sparse ones of each layer, which must agree; none failed."""
    assert layers and not any(layer["failures"] or layer["off"] for layer in layers)
    (count,) = {layer["chunks"] for layer in layers}
    return count


def test_a_stream_and_its_second_question(server, needle_tokenizer) -> None:
    before = chunks(server.statistics())
    prompt = build_prompt(needle_tokenizer, 16384, seed=31)
    reply = server.complete(prompt.token_ids)
    assert is_correct(reply.text, prompt.answer) and reply.parts >= 2, reply
    assert chunks(server.statistics()) == before + 2
    key = next(key for key in prompt.needles if key != prompt.key)
    again = another_question(needle_tokenizer, prompt, key)
    second = server.complete(again.token_ids)
    print({"first": reply, "second": second})
    assert is_correct(second.text, again.answer) and second.cached > 16000
    assert chunks(server.statistics()) == before + 2, "the question alone is short"


def test_eight_at_once(server, needle_tokenizer) -> None:
    lengths = (300, 1500, 3000, 5000, 9000, 12000, 20000, 30000)
    prompts = [build_prompt(needle_tokenizer, tokens, seed=11 * tokens) for tokens in lengths]
    before = chunks(server.statistics())
    assert all(right(prompts, ask(server, prompts, len(prompts))))
    assert chunks(server.statistics()) > before


def test_an_aborted_request_costs_the_others_nothing(server, needle_tokenizer) -> None:
    """Clients hang up while chunks of their prompts run; others, there and later, get their answers."""
    gone = [build_prompt(needle_tokenizer, 32768, seed=seed).token_ids for seed in range(50, 56)]
    prompts = [build_prompt(needle_tokenizer, tokens, seed=13 * tokens) for tokens in (12000, 16384, 20000)]
    with ThreadPoolExecutor(len(gone)) as pool:
        aborted = [pool.submit(server.abort, prompt, 0.02 * index) for index, prompt in enumerate(gone)]
        replies = ask(server, prompts, len(prompts))
        for each in aborted:
            each.result()
    assert all(right(prompts, replies))
    later = server.complete(prompts[0].token_ids)
    assert is_correct(later.text, prompts[0].answer) and server.process.poll() is None


def test_a_worker_that_dies(tmp_path, needle_tokenizer) -> None:
    """Requests that wait for it end with an error, soon, and the server ends and says why."""
    prompt = build_prompt(needle_tokenizer, 32768, seed=60)
    log = tmp_path / "log"
    with ThreadPoolExecutor(4) as pool, Server(ENGINE, True, log) as server:
        waiting = [pool.submit(server.complete, prompt.token_ids, 512) for _ in range(4)]
        time.sleep(0.3)
        assert not any(each.done() for each in waiting)
        before = log.stat().st_size
        server.kill_worker()
        assert not wait(waiting, timeout=90).not_done
        errors = [each.exception() for each in waiting]
        print({"clients": [repr(error)[:300] for error in errors]})
        assert all(isinstance(error, (RuntimeError, OSError, HTTPException)) for error in errors)
        server.process.wait(timeout=90)
    said = re.findall(r".*(?:died|EngineDeadError|crashed).*", log.read_bytes()[before:].decode(errors="replace"))
    print({"exit": server.process.returncode, "log": said[:4]})
    assert said  # vLLM's server ends with status 0


def test_a_soak_of_mixed_lengths(tmp_path, needle_tokenizer) -> None:
    """No request is lost, and every answer is that of the engine's own backend."""
    draw = random.Random(0)
    lengths = [draw.choice((200, 900, 2500, 6000, 9000, 14000, 24000, 32768)) for _ in range(REQUESTS)]
    prompts = [build_prompt(needle_tokenizer, tokens, seed=1000 + index) for index, tokens in enumerate(lengths)]
    replies, seconds, ran = {}, {}, 0
    for sparse in (True, False):
        with Server(ENGINE, sparse, tmp_path / f"log{sparse:d}") as server:
            start = time.monotonic()
            replies[sparse] = ask(server, prompts, AT_ONCE)
            seconds[sparse] = round(time.monotonic() - start, 2)
            ran = chunks(server.statistics()) if sparse else ran
    correct = {sparse: sum(right(prompts, found)) for sparse, found in replies.items()}
    other = [index for index in range(REQUESTS) if replies[True][index].text != replies[False][index].text]
    print({"requests": REQUESTS, "seconds": seconds, "right": correct, "different": other, "chunks": ran})
    assert ran >= REQUESTS // 4
    assert not other and correct[True] == REQUESTS
