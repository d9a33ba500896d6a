"""Triton kernels whose launches cost the CPU little: a selection has up to thirteen, each far shorter than its launch.

Triton asks at each launch how every argument specialises the kernel, what its environment says and whether globals
changed. A launch like an earlier one goes straight to the kernel that was compiled for it.
"""

# Triton's kernels and launches are not what a type checker sees in them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIncompatibleMethodOverride=false

from collections.abc import Callable, Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs

_MOST = 1024  # launches of a kernel that are known: lengths x settings of one process
_ALIGNED = 16  # bytes; a pointer that they divide is another kernel


class Kernel(triton.JITFunction):
    """A `triton.jit` function that knows the launches that it has seen."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._launches: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def run(self, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        """A launch, by the kernel of an earlier one on numbers that are equal and tensors that are alike."""
        if warmup or self.pre_run_hooks or not isinstance(arguments[0], Tensor):
            return super().run(*arguments, grid=grid, warmup=warmup, **named)
        key = (arguments[0].device, tuple([_kind(x) for x in arguments]), tuple(named.items()))
        found = self._launches.get(key)
        if found is None:
            compiled = super().run(*arguments, grid=grid, warmup=False, **named)
            rest = self.arg_names[len(arguments) :]
            if compiled is not None and all(name in named for name in rest):
                if len(self._launches) >= _MOST:
                    self._launches.clear()
                self._launches[key] = compiled, tuple([named[name] for name in rest])
            return compiled
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
        return compiled


def _kind(x: Any) -> Any:
    """What a launch depends on of an argument; numbers that are equal and of different types are different."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % _ALIGNED == 0
    return x if type(x) is int else (type(x), x)


def kernel(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit(do_not_specialize=...)` for a kernel that is launched; in Triton's interpreter just that."""

    def make(function: Callable[..., Any]) -> Any:
        if knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=list(do_not_specialize))
        return Kernel(function, do_not_specialize=list(do_not_specialize))

    return make
