"""Run a prompt through a model with sparse prefill, and look at every layer as it runs."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexprefill_fa.exact import block_mass
from flexprefill_fa.integrations.hf_check import check_some_sparse
from flexprefill_fa.integrations.transformers import (
    LayerDescription,
    SparseCall,
    collect_statistics,
    describe_sparse_prefill,
    enable_sparse_prefill,
    observe_sparse_prefill,
)
from flexprefill_fa.masks import PeakPrefillConfig, Selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.generation import generate_greedily, refusal_in_one_line
from flexprefill_fa.tools.inspection.maps import KINDS, MAP_BYTES, LayerMaps, blocks_per_cell, layer_maps
from flexprefill_fa.tools.inspection.peaks import PARTS, block_peaks
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.progress import WorkProgress


@dataclass(frozen=True)
class HeadReport:
    """What one head kept.

    Attributes:
        layer, head: which.
        pattern: "query_aware", "vertical_slash" or the selector's name.
        js_distance: of FlexPrefill's pattern test, None where there is none.
        density: kept blocks / causal blocks.
        recall: share of the exact attention probability in kept blocks.
    """

    layer: int
    head: int
    pattern: str
    js_distance: float | None
    density: float
    recall: float


@dataclass(frozen=True)
class Inspection:
    """A prompt's sparse prefill.

    Attributes:
        tokens: of the prompt.
        block_size: tokens per block.
        layers: what each layer of the model does in this prompt, and why.
        heads: of the sparse layers.
        maps: by layer, of the sparse layers.
        peaks: by layer, where PeakPrefill runs and a cell of the maps is one block: `Peaks.data`.
    """

    tokens: int
    block_size: int
    layers: tuple[LayerDescription, ...]
    heads: tuple[HeadReport, ...]
    maps: dict[int, LayerMaps]
    peaks: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def density(self) -> float:
        """Mean over the heads of sparse layers."""
        return statistics.fmean(head.density for head in self.heads)

    @property
    def recall(self) -> float:
        """Mean over the heads of sparse layers."""
        return statistics.fmean(head.recall for head in self.heads)


def inspect_prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: Selector,
    progress: WorkProgress,
    mean_correction: MeanCorrection = False,
) -> Inspection:
    """Look at every sparse layer while the model prefills a prompt, as `flexprefill generate` does.

    Each layer sees what the sparse layers below it computed; its recall and its attention map are those of exact
    attention on the same queries and keys. Only one layer's attention is held at a time, summed by blocks.

    Args:
        model: a causal language model.
        input_ids: int64 `[1, n]`.
        config: a selector's config.
        progress: shows the work.
        mean_correction: as for `enable_sparse_prefill`.

    Raises:
        UsageError: if the integration refuses the model, none of its layers runs sparse, or the prompt is so short that
            it runs dense.
    """
    tokens = input_ids.shape[1]
    recall: dict[int, list[float]] = {}
    maps: dict[int, LayerMaps] = {}
    peaks: dict[int, bytes] = {}
    with refusal_in_one_line():
        handle = enable_sparse_prefill(model, config, mean_correction=mean_correction)
    with handle, collect_statistics(model) as found:
        with refusal_in_one_line():
            check_some_sparse(model)
        described = [layer for layer in describe_sparse_prefill(model) if layer.layer is not None]
        if tokens <= config.dense_tokens:
            raise UsageError(
                f"the prompt runs dense, there is nothing to inspect: {config.name} keeps every block of prompts of up "
                f"to {config.dense_tokens} tokens with these settings, this has {tokens}"
            )
        budget = MAP_BYTES / sum(layer.runs == "sparse" for layer in described)
        if isinstance(config, PeakPrefillConfig):
            budget *= len(KINDS) / len((*KINDS, *PARTS))

        def look(call: SparseCall) -> None:
            recall[call.layer], maps[call.layer] = _look(call, tokens, budget)
            if isinstance(config, PeakPrefillConfig) and maps[call.layer].group == 1:
                peaks[call.layer] = block_peaks(call.query[0], call.key[0], config, call.scale).data()

        with observe_sparse_prefill(model, look):
            generate_greedily(model, input_ids, 1, progress, f"inspecting {tokens} tokens")
        if not maps:
            raise UsageError(f"every layer ran dense in this prompt of {tokens} tokens: there is nothing to inspect")
        rows = found.latest().rows()
    layers = tuple(_as_it_ran(layer, layer.layer in maps) for layer in described)
    return Inspection(tokens, config.block_size, layers, tuple(_report(row, recall) for row in rows), maps, peaks)


def _look(call: SparseCall, tokens: int, budget: float) -> tuple[list[float], LayerMaps]:
    """Recall of each head, and the layer's maps within a budget of base64 characters."""
    selection = call.selection
    if selection.q_len != tokens:
        raise UsageError(
            f"inspect needs a prefill in one piece, layer {call.layer} got {selection.q_len} of {tokens} tokens: unset "
            "prefill_chunk_size in the model's generation_config.json"
        )
    mass = block_mass(call.query, call.key, selection.block_size, scale=call.scale, softcap=call.softcap)[0]
    keep = selection.to_dense()[0]
    heads, blocks = keep.shape[:2]
    kept = mass.masked_fill(~keep, 0).sum((-2, -1), dtype=torch.float64) / selection.q_len
    first_rows = torch.arange(blocks, device=mass.device) * selection.block_size
    rows = (selection.q_len - first_rows).clamp(max=selection.block_size)
    return kept.tolist(), layer_maps(keep, mass, rows, blocks_per_cell(blocks, heads, budget))


def _report(row: dict[str, Any], recall: dict[int, list[float]]) -> HeadReport:
    layer, head = row["layer"], row["head"]
    return HeadReport(layer, head, row["pattern"][0], row["js_distance"][0], row["density"][0], recall[layer][head])


def _as_it_ran(layer: LayerDescription, sparse: bool) -> LayerDescription:
    if layer.runs != "sparse" or sparse:
        return layer
    return LayerDescription(layer.layer, "dense", "it was given a mask that sparse prefill does not serve")
