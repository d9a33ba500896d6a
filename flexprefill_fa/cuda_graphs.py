"""Sparse prefill for one shape as a CUDA graph: the launches of selection and attention cost the CPU one call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.attention import sparse_prefill_attention
from flexprefill_fa.masks.selector import Selector
from flexprefill_fa.validation import check_padding, check_query_key, check_value

_WARM_UPS = 2  # the first call compiles


class PrefillGraph:
    """`sparse_prefill_attention` captured for the shapes of its example inputs.

    Selection and attention wait for nothing on the host, so the graph follows whatever inputs it is replayed on.

    Example:
        >>> graph = PrefillGraph(query, key, value, FlexPrefillConfig())
        >>> out = graph(other_query, other_key, other_value)

    Args:
        query: `[B, Hq, Lq, D]` on a CUDA device. key, value: `[B, Hkv, Lkv, D]`. Examples: the graph keeps copies.
        config: the selector and its settings.
        starts, lengths: as for `sparse_prefill_attention`; they are part of the graph.
        arguments: further keyword arguments of `sparse_prefill_attention`, without `return_selection`.

    Raises:
        ValueError, TypeError: for tensors that are not on a CUDA device, or arguments that do not fit.
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
        if not query.is_cuda:
            raise ValueError(f"a CUDA graph needs tensors on a CUDA device, got {query.device}")
        if arguments.get("return_selection"):
            raise ValueError("a PrefillGraph returns the output alone, got return_selection=True")
        self._inputs = (query.detach().clone(), key.detach().clone(), value.detach().clone())
        start, length = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
        place = {"starts": _copy(start), "lengths": _copy(length)}
        # The graph reads what this call reads, at the same addresses: both live as long as the graph.
        self._call = partial(sparse_prefill_attention, *self._inputs, config, **place, **arguments)
        self._graph, self._out = _capture(self._call, query.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Replay on these inputs.

        Returns:
            `[B, Hq, Lq, D]`, in memory that the next call overwrites.

        Raises:
            ValueError: for a tensor of another shape, dtype or device than the graph's, or one that requires grad.
        """
        check_query_key(query, key)
        check_value(key, value)
        given = (query, key, value)
        for name, static, tensor in zip(("query", "key", "value"), self._inputs, given, strict=True):
            expected = (tuple(static.shape), static.dtype, static.device)
            got = (tuple(tensor.shape), tensor.dtype, tensor.device)
            if got != expected:
                raise ValueError(f"the graph was captured for a {name} of {expected}, got {got}")
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._out


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _capture(call: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        # A stream of its own: the default one for captures belongs to the device that captured first.
        with torch.cuda.graph(graph, stream=stream):
            out = call()
    return graph, out
