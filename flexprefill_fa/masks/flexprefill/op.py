"""FlexPrefill's selection as one operator: the reference on the CPU, the Triton kernels on CUDA."""

import torch
from torch import Tensor

from flexprefill_fa.masks.flexprefill import reference
from flexprefill_fa.masks.flexprefill.config import FlexPrefillConfig
from flexprefill_fa.masks.operator import Lists, traced_lists


@torch.library.custom_op("flexprefill_fa::select_flexprefill", mutates_args=(), device_types="cpu")
def select_flexprefill(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    settings: Tensor,
    scale: float | None,
    block_size: int,
    all_partial: bool,
    zero_tails: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The blocks that FlexPrefill keeps.

    Args:
        query: `[B, Hq, Lq, D]`. key: `[B, Hkv, Lkv, D]`.
        starts, lengths: int `[B]`, first real key and number of real keys, or None.
        settings: `FlexPrefillConfig.settings()`. A tensor, so that a compiled graph serves every setting.
        scale: score scale, None for 1/sqrt(D).
        block_size: tokens per block.
        all_partial: put every kept block in the partial list (for a mask_mod that may mask anywhere).
        zero_tails: fill index entries past the counts with 0, so that whole outputs can be compared.

    Returns:
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices (int32) and js_distance `[B, Hq]` (fp32).
    """
    config = FlexPrefillConfig.from_settings(settings, block_size)
    return reference.select(query, key, starts, lengths, config, scale, all_partial)


@select_flexprefill.register_kernel("cuda")
def _(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    settings: Tensor,
    scale: float | None,
    block_size: int,
    all_partial: bool,
    zero_tails: bool,
) -> Lists:
    from flexprefill_fa.masks.flexprefill import kernels  # Triton only where it runs

    config = FlexPrefillConfig.from_settings(settings, block_size)
    return kernels.select(query, key, starts, lengths, config, scale, all_partial, zero_tails)


@select_flexprefill.register_fake
def _(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    settings: Tensor,
    scale: float | None,
    block_size: int,
    all_partial: bool,
    zero_tails: bool,
) -> Lists:
    return traced_lists(query, key, block_size)
