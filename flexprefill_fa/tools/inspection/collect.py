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
from flexprefill_fa.integrations.transformers import LayerDescription, SparseCall
from flexprefill_fa.masks import Selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.inspection.maps import MAP_BYTES, LayerMaps, blocks_per_cell, layer_maps
from flexprefill_fa.tools.inspection.reasons import ReasonMaps, find_reasons, map_count, reason_maps
from flexprefill_fa.tools.inspection.watch import Look, watch_prefill
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
        config: the selector's.
        layers: what each layer of the model does in this prompt, and why.
        heads: of the sparse layers.
        maps: by layer, of the sparse layers.
        reasons: by layer, where a cell of the maps is one block.
    """

    tokens: int
    config: Selector
    layers: tuple[LayerDescription, ...]
    heads: tuple[HeadReport, ...]
    maps: dict[int, LayerMaps]
    reasons: dict[int, ReasonMaps] = dataclasses.field(default_factory=dict)

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
    recall: dict[int, list[float]] = {}
    maps: dict[int, LayerMaps] = {}
    reasons: dict[int, ReasonMaps] = {}
    limit = 0.0

    def begin(described: list[LayerDescription]) -> Look:
        nonlocal limit
        limit = MAP_BYTES / sum(layer.runs == "sparse" for layer in described)
        return look

    def look(call: SparseCall) -> None:
        recall[call.layer], maps[call.layer] = _look(call, config, limit)
        if maps[call.layer].group == 1:
            reasons[call.layer] = reason_maps(find_reasons(call, config), config, maps[call.layer].cells)

    described, rows = watch_prefill(model, input_ids, config, progress, mean_correction, begin)
    layers = tuple(_as_it_ran(layer, layer.layer in maps) for layer in described)
    heads = tuple(_report(row, recall) for row in rows)
    return Inspection(input_ids.shape[1], config, layers, heads, maps, reasons)


def _look(call: SparseCall, config: Selector, limit: float) -> tuple[list[float], LayerMaps]:
    """Recall of each head, and the layer's maps, which leave the reasons their part of so much base64 text."""
    selection = call.selection
    mass = block_mass(call.query, call.key, selection.block_size, scale=call.scale, softcap=call.softcap)[0]
    keep = selection.to_dense()[0]
    heads, blocks = keep.shape[:2]
    kept = mass.masked_fill(~keep, 0).sum((-2, -1), dtype=torch.float64) / selection.q_len
    first_rows = torch.arange(blocks, device=mass.device) * selection.block_size
    rows = (selection.q_len - first_rows).clamp(max=selection.block_size)
    count = map_count(heads, shares=type(config).block_shares is not Selector.block_shares)
    return kept.tolist(), layer_maps(keep, mass, rows, blocks_per_cell(blocks, count, limit))


def _report(row: dict[str, Any], recall: dict[int, list[float]]) -> HeadReport:
    layer, head = row["layer"], row["head"]
    return HeadReport(layer, head, row["pattern"][0], row["js_distance"][0], row["density"][0], recall[layer][head])


def _as_it_ran(layer: LayerDescription, sparse: bool) -> LayerDescription:
    if layer.runs != "sparse" or sparse:
        return layer
    return LayerDescription(layer.layer, "dense", "it was given a mask that sparse prefill does not serve")
