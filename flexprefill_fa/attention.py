"""Sparse prefill attention in one call: select, build the BlockMask, run compiled FlexAttention."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flexprefill_fa import dispatch
from flexprefill_fa.autocast import as_sdpa_casts
from flexprefill_fa.block_mask import check_layout
from flexprefill_fa.calls import attend
from flexprefill_fa.masks.selector import Selector, check_selector
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.region import Call, run_attend
from flexprefill_fa.selection import BlockSelection, check_selection
from flexprefill_fa.validation import (
    check_graph,
    check_mean_correction,
    check_padding,
    check_query_key,
    check_scale,
    check_value,
)


def sparse_prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Selector,
    *,
    scale: float | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mean_correction: MeanCorrection = False,
    dense: str = "auto",
    backend: str = "auto",
    graph: str = "never",
    return_selection: bool = False,
) -> Any:
    """Causal attention over the key blocks that a selector keeps.

    The first call of a kind (dtype, head dim, padding or none, batch 1 or more) compiles for some seconds; later ones
    of any length reuse the graph. Where `dense` is "auto" and there is no mask_mod or score_mod, single queries,
    prompts short enough to keep every block, and whole prompts that the cost model expects to be faster dense run as
    dense attention; a debug log line says so.

    Args:
        query: `[B, Hq, Lq, D]`, fp32, bf16 or fp16; the last Lq positions of the keys.
        key, value: `[B, Hkv, Lkv, D]`, Hq a multiple of Hkv. Padded rows must be finite: they get weight 0, and
            0 x NaN is NaN.
        config: the selector and its settings, e.g. `FlexPrefillConfig(gamma=0.95)`.
        scale: score scale for selection and attention, default 1/sqrt(D).
        lengths: number of real keys of each batch element, int `[B]`; starts: position of its first real key.
        mask_mod: a further mask, in FlexAttention's sense (q_idx counts from the first query, kv_idx from the first
            key). The selector does not see it. Every block is then masked pair by pair, which costs up to 2x.
        score_mod: FlexAttention's score_mod. The selector does not see it.
        mean_correction: let each dropped block count, True: with its mean key and value, "tilted": with means tilted
            to what later queries look at, see `block_summaries.py`. Not with a mask_mod or score_mod; on the CPU with
            torch 2.13 and newer.
        dense: "auto", or "never" to insist on the selector's blocks.
        backend: the kernel, "TRITON", "FLASH" or "CPU"; "auto" takes the fastest one that runs, also for dense
            attention.
        graph: "auto" to capture sparse calls that come again as CUDA graphs, see `graph_cache.py`; the output is the
            caller's own. Without one go calls on the CPU, while torch.compile traces or a graph is captured, under
            autocast or a mode, with a mask_mod or score_mod, with return_selection, of more than 16,384 keys, and what
            cannot be captured.
        return_selection: also return the `BlockSelection` that was computed; where attention ran dense, every block.

    Returns:
        `[B, Hq, Lq, D]`, or (that, BlockSelection). Rows of padded queries mean nothing.

    Raises:
        ValueError, TypeError: for arguments that do not fit, inputs that require grad, or a backend that cannot run.
    """
    check_graph(graph)
    check_selector(config)
    if starts is not None or lengths is not None:
        check_query_key(query, key)
        starts, lengths = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
    request = dispatch.Request(
        scale, starts, lengths, mask_mod, score_mod, mean_correction, dense=dense, backend=backend
    )
    out, selection, _ = attend(query, key, value, config, request, graph=graph, selected=return_selection)
    return (out, selection()) if return_selection else out


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mean_correction: MeanCorrection = False,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over the blocks of a given selection, compiled as `sparse_prefill_attention` is.

    Args:
        query, key, value, scale, score_mod, mean_correction, backend: as for `sparse_prefill_attention`.
        selection: the blocks to compute, for these lengths and this padding.
        mask_mod: a further mask; it needs a selection made with `all_partial=True`, because FlexAttention evaluates
            no mask in full blocks.

    Returns:
        `[B, Hq, Lq, D]`. Rows of padded queries mean nothing.

    Raises:
        ValueError, TypeError: for arguments that do not fit, or a backend that cannot run.
    """
    check_selection(selection)
    check_query_key(query, key)
    check_value(key, value)
    check_scale(scale)
    check_mean_correction(mean_correction, mask_mod, score_mod, query.device)
    expected = (selection.q_len, selection.kv_len, *selection.kv_num_blocks.shape[:2])
    got = (query.shape[2], key.shape[2], query.shape[0], query.shape[1])
    if got != expected:
        raise ValueError(f"the selection is for (q_len, kv_len, batch, heads) = {expected}, got tensors of {got}")
    if selection.kv_num_blocks.device != query.device:
        raise ValueError(
            f"selection and query must be on one device, got {selection.kv_num_blocks.device} and {query.device}"
        )
    if mask_mod is not None and not selection.all_partial:
        raise ValueError("a mask_mod needs a selection made with all_partial=True, got one with full blocks")
    check_layout(selection)
    query, key, value = as_sdpa_casts(query, key, value)
    starts, lengths = selection.starts, selection.lengths
    request = dispatch.Request(scale, starts, lengths, mask_mod, score_mod, mean_correction, backend=backend)
    _, options = dispatch.kernel_for(query, key, selection.block_size, request)
    call = Call(selection.block_size, scale, mask_mod, score_mod, options, mean_correction)
    return run_attend(query, key, value, selection.lists, starts, lengths, call)
