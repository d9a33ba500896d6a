"""A serving engine from its Python files alone: its modules are imported with placeholders for what is not there."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any


class Open(type):
    """Of classes whose missing attributes are `Anything`."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=Open):
    """What is taken from a `Placeholder`: a class that can be made, subclassed and indexed, and decorates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self

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
    """Finds placeholders; `used` are the modules that were replaced.

    Args:
        absent: modules that are replaced where they are not there.
        unused: modules that are replaced all the same.
    """

    def __init__(self, absent: tuple[str, ...], unused: tuple[str, ...]) -> None:
        self.used: list[str] = []
        self._absent, self._unused = absent, unused

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        absent = _within(fullname, self._absent) and not importlib.machinery.PathFinder.find_spec(fullname, path)
        if not absent and not _within(fullname, self._unused):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.used.append(spec.name)
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _within(fullname: str, packages: tuple[str, ...]) -> bool:
    return any(fullname == name or fullname.startswith(f"{name}.") for name in packages)


def put_in_place(folder: Path, absent: tuple[str, ...], unused: tuple[str, ...]) -> Placeholders:
    """Make imports find the files in a folder, in this process, and placeholders as `Placeholders` says."""
    sys.path.insert(0, str(folder))
    finder = Placeholders(absent, unused)
    sys.meta_path.insert(0, finder)
    return finder
