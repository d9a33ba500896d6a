"""CUDA graphs of calls that come again: what `sparse_prefill_attention(..., graph="auto")` runs.

The first call of a kind runs as it is, the second is captured as a `PrefillGraph`, later ones are replayed. A kind is
all that a call depends on but values: shapes, dtypes, device, settings, options (see `calls.py`), and the stream.

What a graph holds on to: copies of query, key and value, an output, and what selection and attention need in between.
Queries of 32 heads and keys of 8, of 128 dimensions in half precision, come to 84 MB at 4K tokens and 0.34 GB at 16K,
and to a few MB in between. There are `MOST_GRAPHS` at a time, of prompts up to `MOST_TOKENS`.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard

from flexprefill_fa.cuda_graphs import PrefillGraph
from flexprefill_fa.dispatch import Request
from flexprefill_fa.masks.selector import Selector

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8
MOST_TOKENS = 16384  # keys; beyond them the GPU takes longer than the CPU needs to launch its work
_FIRST_PATIENCE = 2  # sights of a kind until it is captured
_MORE_PATIENCE = 8  # times as many once its graph had to go: shapes that take turns are not captured again and again
_MOST_PATIENCE = 1024
_MOST_SIGHTS = 1024  # kinds that are counted

_T = TypeVar("_T")


class _Held:
    """A graph, and the state of the process that it was captured in: precision, determinism and the like."""

    def __init__(self, graph: PrefillGraph, device: torch.device) -> None:
        self.graph, self.device, self.state = graph, device, GlobalStateGuard()


class GraphCache:
    """The graphs of one process, the most recently used."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._sights: dict[Hashable, tuple[int, float]] = {}  # sights since, and until the next capture
        self._lock = threading.Lock()  # inputs, replay and output of one call at a time

    def __len__(self) -> int:
        return len(self._held)

    @torch.no_grad()
    def replay(
        self, kind: Hashable, query: Tensor, key: Tensor, value: Tensor, config: Selector, request: Request
    ) -> Tensor | None:
        """The output of a checked call in memory of its own, or None where the call goes without a graph.

        Args:
            kind: of the call, see `calls.kind_of`, which is one that runs sparse.
            config, request: what was asked for.
        """
        stream = stream_for_graphs(query, key)
        if stream is None:
            return None
        kind = kind, stream
        place: Any = {"starts": request.starts, "lengths": request.lengths}
        with self._lock:
            held = self._held.get(kind)
            if held is not None and not held.state.check():
                self._drop(kind)
                return None
            if held is None and not self._is_due(kind):
                return None
            try:
                if held is None:
                    while len(self._held) >= MOST_GRAPHS:
                        self._drop(next(iter(self._held)))
                    graph = PrefillGraph(
                        query, key, value, config, **place, scale=request.scale, dense="never",
                        mean_correction=request.mean_correction, backend=request.backend,
                    )  # fmt: skip
                    held = _Held(graph, query.device)
                    self._held[kind] = held
                self._held.move_to_end(kind)
                return held.graph(query, key, value, **place).clone()
            except torch.OutOfMemoryError as error:
                # As text: an error that a log keeps keeps the tensors of its frames.
                logger.warning("a call goes without a CUDA graph, and all graphs are dropped: %s", str(error))
                if kind not in self._held:
                    self._wait_longer(kind)
                self._drop_all()
            except (ValueError, RuntimeError) as error:
                logger.warning("calls of this kind go without a CUDA graph: %s", str(error))
                if kind in self._held:
                    self._drop(kind)
                self._sights[kind] = (0, math.inf)
        return None

    def give_way(self, call: Callable[[], _T]) -> _T:
        """Run a call; where it runs out of memory while there are graphs, once more without them."""
        try:
            return call()
        except torch.OutOfMemoryError:
            if not self._held:
                raise
        self.release()
        return call()

    def release(self) -> None:
        """Drop all graphs, and count their kinds anew; waits for the replays under way."""
        with self._lock:
            self._drop_all()
            self._sights = {kind: state for kind, state in self._sights.items() if math.isinf(state[1])}

    def _is_due(self, kind: Hashable) -> bool:
        sights, needed = self._sights.get(kind, (0, _FIRST_PATIENCE))
        if len(self._sights) >= _MOST_SIGHTS:
            self._sights.clear()
        self._sights[kind] = (sights + 1, needed)
        return sights + 1 >= needed

    def _wait_longer(self, kind: Hashable) -> None:
        _, needed = self._sights.get(kind, (0, _FIRST_PATIENCE))
        self._sights[kind] = (0, min(needed * _MORE_PATIENCE, _MOST_PATIENCE))

    def _drop(self, kind: Hashable) -> None:
        held = self._held.pop(kind)
        self._wait_longer(kind)
        if held.device.type == "cuda":
            torch.cuda.synchronize(held.device)

    def _drop_all(self) -> None:
        for kind in list(self._held):
            self._drop(kind)


def stream_for_graphs(query: Tensor, key: Tensor) -> int | None:
    """The current stream, by its handle; None for calls without graphs: on a CPU, in a capture, of long prompts."""
    if not query.is_cuda or key.shape[2] > MOST_TOKENS:
        return None
    with torch.cuda.device(query.device):
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream


GRAPHS = GraphCache()


def release_graphs() -> None:
    """Drop the graphs that calls with `graph="auto"` made, and give their memory back; waits for their replays."""
    GRAPHS.release()
