"""A release of vLLM from its Python files alone."""

from __future__ import annotations

from pathlib import Path

import engine_files
from engine_files import Placeholders

COMPILED = ("_C", "_C_stable_libtorch", "_moe_C", "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")
"""Modules of vLLM."""
PACKAGES = """
cachetools cbor2 cloudpickle cpuinfo cv2 fastapi gguf llguidance mistral_common msgspec openai openai_harmony
partial_json_parser prometheus_client pybase64 pynvml sentencepiece setproctitle tiktoken uvloop xgrammar zmq
"""
"""What vLLM imports at once; replaced where the tests' environment does not have it."""
UNUSED = ("vllm.distributed.kv_transfer", "vllm.parser")
"""Files of vLLM that are replaced all the same: they import its server, and the integration does not use them."""


def put_in_place(folder: Path) -> Placeholders:
    """Make `import vllm` find the files in a folder, in this process."""
    return engine_files.put_in_place(folder, (*(f"vllm.{name}" for name in COMPILED), *PACKAGES.split()), UNUSED)
