"""A stand-in for `PrefillGraph` that runs the call, for tests without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexprefill_fa import graph_cache
from flexprefill_fa import sparse_prefill_attention as attend
from flexprefill_fa.graph_cache import GraphCache


class Graph:
    """As a PrefillGraph: one output, which each replay overwrites, and inputs that it copies."""

    made: list[Graph]
    fails: list[Exception | None]  # of the next that are made, and of the next replays

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, config: Any, **arguments: Any) -> None:
        self.made.append(self)
        if self.fails and (error := self.fails.pop(0)):
            raise error
        self.config, self.arguments, self.replays = config, arguments, 0
        self.static = query.clone(), key.clone(), value.clone()
        self.out = torch.full_like(query, torch.nan)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **place: Any) -> Tensor:
        if self.fails and (error := self.fails.pop(0)):
            raise error
        self.replays += 1
        for static, given in zip(self.static, (query, key, value), strict=True):
            static.copy_(given)
        return self.out.copy_(attend(*self.static, config=self.config, **(self.arguments | place)))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Put it in the place of graphs; those that will be made, in order."""
    Graph.made, Graph.fails = [], []
    monkeypatch.setattr(graph_cache, "GRAPHS", GraphCache())
    monkeypatch.setattr(graph_cache, "PrefillGraph", Graph)
    monkeypatch.setattr(graph_cache, "stream_for_graphs", lambda query, key: 0)
    return Graph.made
