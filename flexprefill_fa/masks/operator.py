"""The one form of a selector's operator: arguments, results, and what tracing sees of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.autocast import without_autocast
from flexprefill_fa.grid import cdiv

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def select_operator(
    name: str, config_class: Any, plain: Callable[..., Lists], triton: Callable[..., Lists] | None
) -> Any:
    """Define the operator `flexprefill_fa::select_<name>`.

    Args:
        name: of the selector.
        config_class: its config, with `from_settings`.
        plain: `(query, key, starts, lengths, config, scale, all_partial) -> Lists` in plain PyTorch.
        triton: the same with a last argument `zero_tails`, for CUDA; None where `plain` serves every device.

    Returns:
        The operator, with these arguments:
        query `[B, Hq, Lq, D]` and key `[B, Hkv, Lkv, D]`;
        starts, lengths: int `[B]`, first real key and number of real keys, or None;
        settings: `config.settings()`, a tensor, so that a compiled graph serves every setting;
        scale: score scale, None for 1/sqrt(D);
        block_size: tokens per block;
        all_partial: put every kept block in the partial list (for a mask_mod that may mask anywhere);
        zero_tails: fill index entries past the counts with 0, so that whole outputs can be compared.
        It gives kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices (int32) and js_distance `[B, Hq]`
        (fp32, zeros where a selector has none).
    """

    def select(
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
        config = config_class.from_settings(settings, block_size)
        with without_autocast(query.device.type):
            return plain(query, key, starts, lengths, config, scale, all_partial)

    devices = None if triton is None else "cpu"
    operator = torch.library.custom_op(f"flexprefill_fa::select_{name}", select, mutates_args=(), device_types=devices)
    if triton is not None:

        @operator.register_kernel("cuda")
        def _(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
            config = config_class.from_settings(settings, block_size)
            return triton(query, key, starts, lengths, config, scale, all_partial, zero_tails)

    @operator.register_fake
    def _(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
        return traced_lists(query, key, block_size)

    return operator


def traced_lists(query: Tensor, key: Tensor, block_size: int) -> Lists:
    """What tracing sees of a selector's results, unwritten."""
    batch, heads, q_len, _ = query.shape
    rows, columns = cdiv(q_len, block_size), cdiv(key.shape[2], block_size)
    count = query.new_empty((batch, heads, rows), dtype=torch.int32)
    indices = query.new_empty((batch, heads, rows, columns), dtype=torch.int32)
    return (
        count,
        indices,
        torch.empty_like(count),
        torch.empty_like(indices),
        query.new_empty((batch, heads), dtype=torch.float32),
    )
