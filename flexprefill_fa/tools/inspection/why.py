"""Why a query block keeps its key blocks, as text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from flexprefill_fa.grid import cdiv
from flexprefill_fa.integrations.transformers import LayerDescription, SparseCall
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.inspection.place import Place
from flexprefill_fa.tools.inspection.reasons import find_reasons, rule_words, share_words
from flexprefill_fa.tools.inspection.watch import Look, watch_prefill
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.progress import WorkProgress


def explain_place(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: Any,
    progress: WorkProgress,
    mean_correction: MeanCorrection,
    place: Place,
) -> list[str]:
    """Ask one layer of a prompt's sparse prefill; no exact attention is computed.

    Args:
        model, input_ids, config, progress, mean_correction: as for `inspect_prefill`.
        place: what is asked about.

    Returns:
        Lines of text: where it is and how many are kept, then one for each kept block; or one for the key block.

    Raises:
        UsageError: as for `inspect_prefill`, and for a layer, head or block that is not there or not sparse.
    """
    tokens = input_ids.shape[1]
    lines: list[str] = []

    def begin(described: list[LayerDescription]) -> Look:
        layers = {layer.layer: layer for layer in described}
        layer = layers.get(place.layer)
        if layer is None:
            raise UsageError(f"layer must be one with attention ({', '.join(map(str, layers))}), got {place.layer}")
        if layer.runs != "sparse":
            raise UsageError(f"layer {place.layer} runs {layer.runs}, no selector decides there: {layer.why}")
        _check("query block", place.query_block, cdiv(tokens, config.block_size))
        if place.key_block is not None:
            _check(f"key block for query block {place.query_block}", place.key_block, place.query_block + 1)
        return look

    def look(call: SparseCall) -> None:
        if call.layer == place.layer:
            _check("head", place.head, call.query.shape[1])
            lines.extend(_lines(place, call, config, tokens))

    watch_prefill(model, input_ids, config, progress, mean_correction, begin)
    if not lines:
        raise UsageError(f"layer {place.layer} ran dense in this prompt of {tokens} tokens: every block was kept")
    return lines


def _check(what: str, number: int, count: int) -> None:
    if number >= count:
        raise UsageError(f"{what} must be from 0 to {count - 1}, got {number}")


def _lines(place: Place, call: SparseCall, config: Any, tokens: int) -> list[str]:
    row = place.query_block
    keep = call.selection.to_dense()[0, place.head, row].tolist()
    reasons = find_reasons(call, config)

    def named(what: str, block: int) -> str:
        first = block * config.block_size
        return f"{what} {block} ({first:,}–{min(first + config.block_size, tokens) - 1:,})"

    def said(block: int) -> str:
        clauses = ", ".join(name for name, blocks in reasons.clauses.items() if blocks[row, block])
        words = [f"kept: {clauses or rule_words(config)}" if keep[block] else "not kept"]
        if reasons.shares is not None:
            words.append(share_words(config, reasons.shares, place.head, row, block))
        return f"{named('key block', block)} {'; '.join(words)}"

    where = f"layer {place.layer}, head {place.head}, {named('query block', row)}"
    nothing = "" if reasons.shares is not None else f" ({config.name} has no share of single blocks to show)"
    if place.key_block is not None:
        return [f"{where}, {said(place.key_block)}{nothing}"]
    kept = [block for block in range(row + 1) if keep[block]]
    return [f"{where}: {len(kept)} of {row + 1} key blocks kept{nothing}", *map(said, kept)]
