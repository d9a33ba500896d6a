"""A prompt's sparse prefill, watched layer by layer as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from flexprefill_fa.integrations.hf_check import check_some_sparse
from flexprefill_fa.integrations.transformers import (
    LayerDescription,
    SparseCall,
    collect_statistics,
    describe_sparse_prefill,
    enable_sparse_prefill,
    observe_sparse_prefill,
)
from flexprefill_fa.masks import Selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.generation import generate_greedily, refusal_in_one_line
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.progress import WorkProgress

Look = Callable[[SparseCall], None]


def watch_prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: Selector,
    progress: WorkProgress,
    mean_correction: MeanCorrection,
    begin: Callable[[list[LayerDescription]], Look],
) -> tuple[list[LayerDescription], list[dict[str, Any]]]:
    """Prefill a prompt as `flexprefill generate` does, and look at every sparse layer.

    Args:
        model: a causal language model.
        input_ids: int64 `[1, n]`.
        config: a selector's config.
        progress: shows the work.
        mean_correction: as for `enable_sparse_prefill`.
        begin: is told the language layers before anything runs, and returns what looks at each sparse layer.

    Returns:
        The language layers, and the statistics of the sparse ones, a row for each head.

    Raises:
        UsageError: if the integration refuses the model, none of its layers runs sparse, the prompt is so short that
            it runs dense, or it is read in several pieces.
    """
    tokens = input_ids.shape[1]
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
        look, seen = begin(described), False

        def look_at_all(call: SparseCall) -> None:
            nonlocal seen
            if call.selection.q_len != tokens:
                raise UsageError(
                    f"inspect needs a prefill in one piece, layer {call.layer} got {call.selection.q_len} of {tokens} "
                    "tokens: unset prefill_chunk_size in the model's generation_config.json"
                )
            seen = True
            look(call)

        with observe_sparse_prefill(model, look_at_all):
            generate_greedily(model, input_ids, 1, progress, f"inspecting {tokens} tokens")
        if not seen:
            raise UsageError(f"every layer ran dense in this prompt of {tokens} tokens: there is nothing to inspect")
        return described, found.latest().rows()
