"""SGLang from the files of its wheel, in this process; no GPU and nothing of it installed."""

from __future__ import annotations

from pathlib import Path

import engine_files
from engine_files import Placeholders

PACKAGES = """
IPython aiohttp anthropic blobfile compressed_tensors cuda deep_ep deep_gemm dill easydict fastapi flash_attn flashinfer
gguf humming interegular llguidance mistral_common modelscope mooncake ninja numba openai openai_harmony orjson outlines
partial_json_parser prometheus_client py_spy pybase64 pynvml scipy sentencepiece setproctitle sgl_kernel soundfile
starlette tiktoken timm torch_memory_saver torchvision tvm_ffi uvicorn uvloop watchfiles xgrammar xxhash zmq zstandard
"""
"""What SGLang imports at once; replaced where the tests' environment does not have it."""
UNUSED = ("sglang.srt.multimodal", "sglang.srt.layers.quantization.auto_round")
"""Files of SGLang that are replaced all the same: they need compiled packages, and nothing here uses them."""
_ASKED_BY_TRANSFORMERS = ("torchvision", "sentencepiece", "mistral_common", "scipy", "soundfile", "tiktoken")


def put_in_place(folder: Path) -> Placeholders:
    """Make `import sglang` find the files in a folder, which has msgspec too: SGLang's classes are made of it."""
    from transformers.utils import import_utils

    for name in _ASKED_BY_TRANSFORMERS:  # it remembers the answer, and would take a placeholder for the package
        getattr(import_utils, f"is_{name}_available", bool)()
    return engine_files.put_in_place(folder, tuple(PACKAGES.split()), UNUSED)
