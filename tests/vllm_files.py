"""A release of vLLM from its Python files alone: its modules are imported with placeholders for what is not there."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

COMPILED = ("_C", "_C_stable_libtorch", "_moe_C", "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")
"""Modules of vLLM."""
PACKAGES = """
cachetools cbor2 cloudpickle cpuinfo cv2 fastapi gguf llguidance mistral_common msgspec openai openai_harmony
partial_json_parser prometheus_client pybase64 pynvml sentencepiece setproctitle tiktoken uvloop xgrammar zmq
"""
"""What vLLM imports at once; replaced where the tests' environment does not have it."""
UNUSED = ("vllm.distributed.kv_transfer", "vllm.parser")
"""Files of vLLM that are replaced all the same: they import its server, and the integration does not use them."""


class Anything:
    """What is taken from a `Placeholder`: a class that can be made, subclassed and indexed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, str]:
        return {"type": "any"}


class Placeholder(types.ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Anything,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is named above; `used` are the modules that were replaced."""

    def __init__(self) -> None:
        self.used: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not _within(fullname, UNUSED):
            wanted = (*(f"vllm.{name}" for name in COMPILED), *PACKAGES.split())
            if not _within(fullname, wanted) or importlib.machinery.PathFinder.find_spec(fullname, path):
                return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.used.append(spec.name)
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _within(fullname: str, packages: tuple[str, ...]) -> bool:
    return any(fullname == name or fullname.startswith(f"{name}.") for name in packages)


def put_in_place(folder: Path) -> Placeholders:
    """Make `import vllm` find the files in a folder, in this process."""
    sys.path.insert(0, str(folder))
    finder = Placeholders()
    sys.meta_path.insert(0, finder)
    return finder
