"""Sparse prefill for one shape as a CUDA graph: the launches of selection and attention cost the CPU one call."""

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.attention import sparse_prefill_attention
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.validation import check_padding, check_query_key, check_value

_ASKED = threading.Lock()
_WAITS = "called a synchronizing CUDA operation"  # what torch warns of


class PrefillGraph:
    """`sparse_prefill_attention` captured for the shapes of its example inputs.

    Selection and attention wait for nothing on the host, so the graph follows whatever inputs it is replayed on.

    Example:
        >>> graph = PrefillGraph(query, key, value, FlexPrefillConfig())
        >>> out = graph(other_query, other_key, other_value)

    Args:
        query: `[B, Hq, Lq, D]` on a CUDA device. key, value: `[B, Hkv, Lkv, D]`. Examples: the graph keeps copies.
        config: the selector and its settings.
        starts, lengths: as for `sparse_prefill_attention`; replays may give others.
        arguments: further keyword arguments of `sparse_prefill_attention`, without `return_selection` and `graph`.

    Raises:
        ValueError, TypeError: for tensors that are not on a CUDA device, arguments that do not fit, or a call that
            waits for the GPU, as a rule in plain PyTorch does where there is padding.
        torch.OutOfMemoryError: where the copies or the capture find too little memory; nothing of them stays.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: Selector,
        *,
        starts: Tensor | Sequence[int] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        **arguments: Any,
    ) -> None:
        check_query_key(query, key)
        check_value(key, value)
        _check_device(query)
        if arguments.get("return_selection"):
            raise ValueError("a PrefillGraph returns the output alone, got return_selection=True")
        if arguments.get("graph", "never") != "never":
            raise ValueError(f"a PrefillGraph is a graph already, got graph={arguments['graph']!r}")
        padding = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
        self._config, self._settings = config, _fields(config)
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode is written there alone
            self._inputs = (query.detach().clone(), key.detach().clone(), value.detach().clone())
            self._made_for, self._place = ([None if x is None else x.clone() for x in padding] for _ in range(2))
            # The graph reads what this call reads, at the same addresses: both live as long as the graph.
            place = {"starts": self._place[0], "lengths": self._place[1]}
            self._call = partial(sparse_prefill_attention, *self._inputs, config, **place, **arguments)
            self._graph, self._out = _capture(self._call, query.device)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        starts: Tensor | Sequence[int] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Replay on these inputs, of any strides, on the current stream.

        Args:
            query, key, value: like the examples.
            starts, lengths: for this replay; None: those that the graph was made for.

        Returns:
            `[B, Hq, Lq, D]`, in memory that the next call overwrites.

        Raises:
            ValueError: for a tensor of another shape, dtype or device than the graph's, or one that requires grad; for
                starts or lengths where the graph was made without; or if the config was changed since.
        """
        check_query_key(query, key)
        check_value(key, value)
        given = (query, key, value)
        for name, static, tensor in zip(("query", "key", "value"), self._inputs, given, strict=True):
            expected = (tuple(static.shape), static.dtype, static.device)
            got = (tuple(tensor.shape), tensor.dtype, tensor.device)
            if got != expected:
                raise ValueError(f"the graph was captured for a {name} of {expected}, got {got}")
        if _fields(self._config) != self._settings:
            raise ValueError(
                f"the config was changed since the graph was captured: expected {self._settings}, got "
                f"{_fields(self._config)}; make a new PrefillGraph"
            )
        place = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
        for name, static, tensor in zip(("starts", "lengths"), self._place, place, strict=True):
            if static is None and tensor is not None:
                raise ValueError(f"the graph was captured without {name}, got {name}: make one with them")
        with torch.no_grad():
            for static, tensor in zip(self._inputs, given, strict=True):
                static.copy_(tensor)
            for static, tensor, own in zip(self._place, place, self._made_for, strict=True):
                if static is not None and own is not None:
                    static.copy_(own if tensor is None else tensor)
        self._graph.replay()
        return self._out


def _check_device(query: Tensor) -> None:
    if not query.is_cuda:
        raise ValueError(f"a CUDA graph needs tensors on a CUDA device, got {query.device}")


def _fields(config: Selector) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _capture(call: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            call()  # compiles
            _check_that_nothing_waits(call)
        before.wait_stream(stream)
        try:
            # A stream of its own: the default one for captures belongs to the device that captured first. Other threads
            # may go on allocating.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                out = call()
        finally:
            torch.cuda.set_stream(before)  # which a capture that cannot be ended leaves as it is
    return graph, out


def _check_that_nothing_waits(call: Callable[[], object]) -> None:
    """Run the call, and refuse it if it waits for the GPU: a capture that fails leaves torch's generators unusable.

    torch's mode and Python's warnings are the process's: that other threads wait meanwhile is nothing to this call, and
    one call at a time is asked. A thread that catches warnings itself at that moment may still hide them.
    """
    waits: list[Warning | str] = []
    mine = threading.get_ident()
    with _ASKED, warnings.catch_warnings():
        mode = torch.cuda.get_sync_debug_mode()
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def show(message: Warning | str, *where: Any, **named: Any) -> None:
            if _WAITS not in str(message):
                shown(message, *where, **named)
            elif threading.get_ident() == mine:
                waits.append(message)

        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise ValueError("no CUDA graph can hold this call: it waits for the GPU, in its selector or in a mod")
