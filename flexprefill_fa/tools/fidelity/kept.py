"""What each layer keeps of a text, over all chunks of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexprefill_fa.grid import cdiv
from flexprefill_fa.integrations.hf_plan import AS_ASKED
from flexprefill_fa.integrations.transformers import LayerDescription, SparseCall


@dataclass(frozen=True)
class LayerKept:
    """One layer, the mean over its heads.

    Attributes:
        layer: its index.
        density: kept blocks / causal blocks.
        recall: share of the exact attention probability in kept blocks, None where it was not measured.
    """

    layer: int
    density: float
    recall: float | None


@dataclass
class KeptBlocks:
    """Adds up what sparse prefills keep; an observer for `observe_sparse_prefill`.

    Attributes:
        tokens: of the text.
        recall: whether to measure recall (exact attention: slow).
    """

    tokens: int
    recall: bool
    _dropped: dict[int, Tensor] = field(default_factory=dict)  # blocks, of the mean head
    _missed: dict[int, Tensor] = field(default_factory=dict)  # probability, summed over the queries of the mean head

    def __call__(self, call: SparseCall) -> None:
        """Add a chunk of a layer."""
        layer, selection = call.layer, call.selection
        causal = _causal_blocks(selection.q_len, selection.kv_len, selection.block_size)
        dropped = causal - selection.kept_blocks().double().mean()
        self._dropped[layer] = self._dropped.get(layer, torch.zeros_like(dropped)) + dropped
        if self.recall:
            held = selection.recall(call.query, call.key, scale=call.scale, softcap=call.softcap).double().mean()
            self._missed[layer] = self._missed.get(layer, torch.zeros_like(held)) + (1 - held) * selection.q_len

    def layers(self, described: list[LayerDescription], causal: int) -> list[LayerKept]:
        """The layers that a selector or the choice decides about: not those with a window or another reason.

        A layer, or a chunk of it, that no selector saw ran dense and kept everything.

        Args:
            described: what each layer does.
            causal: blocks of a layer that sees every block of all chunks.
        """
        found = []
        for layer in described:
            if layer.runs != "sparse" and not layer.why.startswith(AS_ASKED):
                continue
            index = layer.layer
            assert index is not None  # a part that keeps its own attention runs "own"
            dropped, missed = (float(part.get(index, 0.0)) for part in (self._dropped, self._missed))
            recall = 1 - missed / self.tokens if self.recall else None
            found.append(LayerKept(index, 1 - dropped / causal, recall))
        return found


def causal_blocks(tokens: int, chunk: int | None, block_size: int) -> int:
    """Blocks that dense attention computes of a text, all chunks together."""
    ends = [*range(chunk, tokens, chunk), tokens] if chunk else [tokens]
    return sum(_causal_blocks(end - start, end, block_size) for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _causal_blocks(q_len: int, kv_len: int, block_size: int) -> int:
    offset = kv_len - q_len
    rows = range(0, q_len, block_size)
    return sum(cdiv(offset + min(first + block_size, q_len), block_size) for first in rows)
