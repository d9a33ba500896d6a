"""A compiled region, run again on tensors like those of an earlier call without asking its guards.

At every call torch.compile asks whether one of its graphs fits, under settings that are switched for the call: 0.1 ms
of CPU time and more, where a short prompt keeps a GPU busy for 0.3. What the answer depends on is here a key: layouts,
dtypes and devices of the tensors, all that is no tensor, and the modes that the graph was made under. The first call
of a key goes through torch.compile, and what went into and came out of TorchInductor's part is kept, tensors by their
place among the call's; later ones go to that part. Whatever is not understood goes through torch.compile each time.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo import eval_frame, lookup_backend
from torch._ops import OpOverload

_MOST = 512  # recordings of a region: lengths x layouts x settings of one process; the oldest goes first
_SCALARS = frozenset({type(None), bool, int, float, str})

_local = threading.local()


class _Unknown(Exception):
    """A call with something in it that no key holds."""


class _Graph:
    """What TorchInductor made, which says what it was run on while a call is recorded."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled

    def __call__(self, *given: Any) -> Any:
        results = self.compiled(*given)
        runs = getattr(_local, "runs", None)
        if runs is not None:
            runs.append((self, given, results))
        return results


def inductor(graph: Any, inputs: Any, **arguments: Any) -> _Graph:
    """torch.compile's default backend, for regions that are replayed."""
    return _Graph(lookup_backend("inductor")(graph, inputs, **arguments))


inductor.compiler_name = "inductor"  # pyright: ignore[reportFunctionMemberAccess]  # as which Dynamo knows it


@dataclass(frozen=True)
class _Recording:
    """What a region's graph was run on, and how its results were put together.

    Attributes:
        graph: weak: `torch._dynamo.reset()` and guards that expire take it away.
        given: its arguments, without the tensors; places: where in them which of the call's tensors stand.
        form: the region's result, each tensor as its place among the graph's results.
        state: grad mode, autocast, precision and what else Dynamo asks of the process.
    """

    graph: weakref.ref[_Graph]
    given: list[Any]
    places: list[tuple[int, int]]
    form: Any
    state: GlobalStateGuard

    @classmethod
    def of(cls, runs: list[Any], tensors: list[Tensor], result: Any) -> _Recording:
        """What one call ran.

        Raises:
            _Unknown: if it ran more than one graph, or on something else than the call's tensors and constants.
        """
        if len(runs) != 1:  # none: the region was run as it is
            raise _Unknown
        graph, given, results = runs[0]
        place = {id(tensor): i for i, tensor in enumerate(tensors)}
        if len(place) < len(tensors):  # the same object twice: which one the graph took cannot be told
            raise _Unknown
        places = [(i, place[id(x)]) for i, x in enumerate(given) if id(x) in place]
        constants = [None if id(x) in place else x for x in given]
        if not all(map(_is_constant, constants)):
            raise _Unknown
        form = _form(result, {id(x): i for i, x in enumerate(results)})
        return cls(weakref.ref(graph), constants, places, form, GlobalStateGuard())

    def again(self, graph: _Graph, tensors: list[Tensor]) -> Any:
        given = self.given.copy()
        for i, place in self.places:
            given[i] = tensors[place]
        return _formed(self.form, graph.compiled(*given))


def _is_constant(x: Any) -> bool:
    """A number, or a tensor that Dynamo made of one: of the call's own tensors none is left."""
    return type(x) in _SCALARS or (type(x) is Tensor and x.dim() == 0 and x.device.type == "cpu")


def _form(result: Any, place: dict[int, int]) -> Any:
    if type(result) is tuple:
        return tuple(_form(x, place) for x in result)
    if id(result) not in place:
        raise _Unknown
    return place[id(result)]


def _formed(form: Any, results: Any) -> Any:
    return results[form] if type(form) is int else tuple([_formed(x, results) for x in form])


def _key(x: Any, tensors: list[Tensor]) -> Any:
    """What the graph depends on of an argument; its tensors are added to `tensors`.

    Raises:
        _Unknown: for something that may change without a change of its key, such as a caller's function.
    """
    kind = type(x)
    if kind is Tensor:
        tensors.append(x)
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, torch._C._dispatch_keys(x).raw_repr()
    if kind in _SCALARS:
        return kind, x
    if kind is tuple:
        return tuple([_key(item, tensors) for item in x])
    if kind is dict:
        return tuple([(name, _key(item, tensors)) for name, item in x.items()])
    if kind is OpOverload:
        return x
    if "__dataclass_fields__" in vars(kind) and hasattr(x, "__dict__") and not callable(x):  # code may read anything
        return kind, _key(vars(x), tensors)
    raise _Unknown


def nothing_watches() -> bool:
    """Whether no mode or transform sees the call's operators, and torch.compile stands as it does by default."""
    return (
        torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and eval_frame._stance.stance == "default"
        and eval_frame._stance.backend is None
    )


class Replayed:
    """A region, compiled by `inductor`, and its recordings.

    Args:
        graph: `torch.compile(region, backend=inductor, ...)`.
        settings: what makes the context that torch.compile is called in.
    """

    def __init__(self, graph: Callable[..., Any], settings: Callable[[], AbstractContextManager]) -> None:
        self._graph, self._settings = graph, settings
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The region on these arguments."""
        tensors: list[Tensor] = []
        key = None
        if nothing_watches():
            with contextlib.suppress(_Unknown):
                key = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _key((arguments, named), tensors)
        if key is None:
            with self._settings():
                return self._graph(*arguments, **named)
        found = self._recordings.get(key)
        if found is not None:
            graph = found.graph()
            if graph is not None and found.state.check():
                return found.again(graph, tensors)
        return self._record(key, tensors, arguments, named)

    def _record(self, key: Any, tensors: list[Tensor], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        with self._settings():
            outer, _local.runs = getattr(_local, "runs", None), (runs := [])
            try:
                result = self._graph(*arguments, **named)
            finally:
                _local.runs = outer
        try:
            recording = _Recording.of(runs, tensors, result)
        except _Unknown:
            return result
        while len(self._recordings) >= _MOST:
            self._recordings.pop(next(iter(self._recordings), None), None)
        self._recordings[key] = recording
        return result
