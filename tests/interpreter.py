"""Triton's interpreter without work that changes no result: half of its time, where kernels call many functions."""

from __future__ import annotations

import dataclasses
from typing import Any

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction


def make_quick() -> None:
    """For this process."""
    _look_through_the_language_once()
    _keep_dtypes()
    builder = interpreter.interpreter_builder
    # Without `debug`, which is off, nobody reads whether a sum overflowed.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_through_the_language_once() -> None:
    """A launch puts the interpreter's functions into `triton.language` until it ends.

    Each call of another function in a kernel looks all of the module through again. It finds them there, except for the
    first from a file that knows `triton.language.core` alone, where they then stay.
    """
    ask, known = InterpretedFunction.__call__, set[int]()

    def call(self: Any, *args: Any, **named: Any) -> Any:
        if id(self.fn.__globals__) not in known:
            known.add(id(self.fn.__globals__))
            return ask(self, *args, **named)
        return self.rewrite()(*args, **named)

    InterpretedFunction.__call__ = call


def _keep_dtypes() -> None:
    """Triton's builds a table of all dtypes for each question."""
    ask, known = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = ask(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = numpy_dtype
