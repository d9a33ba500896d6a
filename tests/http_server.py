"""An engine's own server in a process, and a client of its streaming completions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

from needle_served import SETTINGS

from flexprefill_fa.integrations.engine_settings import SECTION
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS

CHUNK = 8192
MAX_LENGTH = 33280


class Reply(NamedTuple):
    """What a stream held: the text, the parts it came in, cached prompt tokens, seconds to the first part."""

    text: str
    parts: int
    cached: int
    first_seconds: float


def command(engine: str, sparse: bool, port: int, share: float) -> list[str]:
    """Of a server of the needle model; `share` of the GPU's memory."""
    section = json.dumps({SECTION: SETTINGS})
    if engine == "vllm":
        arguments = ["vllm.entrypoints.cli.main", "serve", str(MODEL_DIR), "--max-model-len", str(MAX_LENGTH)]
        arguments += ["--max-num-batched-tokens", str(CHUNK), "--gpu-memory-utilization", str(share)]
        arguments += ["--enable-prompt-tokens-details"]
        extension = "flexprefill_fa.integrations.vllm.WorkerExtension"
        arguments += ["--worker-extension-cls", extension]
        ours = ["--attention-backend", "CUSTOM", "--additional-config", section]
    else:
        arguments = ["sglang.launch_server", "--model-path", str(MODEL_DIR), "--context-length", str(MAX_LENGTH)]
        arguments += ["--chunked-prefill-size", str(CHUNK), "--mem-fraction-static", str(share)]
        arguments += ["--enable-cache-report"]
        ours = ["--prefill-attention-backend", "flexprefill", "--json-model-override-args", section]
    common = ["--served-model-name", "needle", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", *arguments, *common, *(ours if sparse else [])]


class Server:
    """A running server; a context manager.

    Args:
        engine: "vllm" or "sglang".
        sparse: with sparse prefill, or the engine's default backend.
        log: the file for what it prints.
        share: of the GPU's memory.
        patience: seconds until it answers.

    Raises:
        RuntimeError: if it ends, or is not there in time; the message holds the end of its log.
    """

    def __init__(self, engine: str, sparse: bool, log: Path, share: float = 0.25, patience: float = 240) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.engine, self.log, self.patience = engine, log, patience
        environment = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", **os.environ}
        environment |= {"VLLM_SERVER_DEV_MODE": "1"}  # its /collective_rpc
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command(engine, sparse, self.port, share),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        end = time.monotonic() + self.patience
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.get("/health") is not None:
                    return self
            except OSError:
                pass
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"no server after {self.patience:.0f} s: {self.log.read_text()[-6000:]}")

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its group, which is its own
        self.process.wait()

    def kill_worker(self) -> None:
        """Kill the process below it that runs the model: the one with most memory."""
        import psutil  # which both engines bring

        below = psutil.Process(self.process.pid).children(recursive=True)
        max(below, key=lambda each: each.memory_info().rss).kill()

    def get(self, path: str) -> bytes | None:
        """The body, None where the status is not 200."""
        return self._answer("GET", path, None)

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> bytes | None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            found = response.read()
            return found if response.status == 200 else None
        finally:
            connection.close()

    def statistics(self) -> list[dict[str, Any]]:
        """Of each sparse layer, since the start."""
        if self.engine == "vllm":
            found = self._answer("POST", "/collective_rpc", {"method": "sparse_prefill_statistics"})
            workers = json.loads(found or b"{}")["results"]
        else:
            states = json.loads(self.get("/server_info") or b"{}")["internal_states"]
            workers = [state.get(SECTION, {}) for state in states]
        return [layer for worker in workers for layer in worker.values()]

    def _open(self, prompt: list[int], tokens: int) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = {"model": "needle", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def complete(self, prompt: list[int], tokens: int = ANSWER_DIGITS) -> Reply:
        """Stream an answer.

        Raises:
            RuntimeError: for another status than 200, an error in the stream, or one that breaks off.
        """
        start = time.monotonic()
        connection = self._open(prompt, tokens)
        try:
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read()[:500]!r}")
            texts, cached, first, done = [], 0, 0.0, False
            for raw in response:
                line = raw.decode().strip()
                if not line.startswith("data:"):
                    continue
                if line.endswith("[DONE]"):
                    done = True
                    break
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(f"an error after {texts}: {event['error']}")
                for choice in event.get("choices") or []:
                    if choice.get("text"):
                        first = first or time.monotonic() - start
                        texts.append(choice["text"])
                details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                cached = details.get("cached_tokens") or cached
            if not done:
                raise RuntimeError(f"the stream broke off after {texts}")
            return Reply("".join(texts), len(texts), cached, first)
        finally:
            connection.close()

    def abort(self, prompt: list[int], after: float) -> None:
        """Ask, and hang up after some seconds."""
        connection = self._open(prompt, 64)
        time.sleep(after)
        connection.close()
