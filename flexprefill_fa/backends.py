"""Which FlexAttention kernel runs, and with which kernel options.

Three kernels exist: TRITON (any CUDA GPU), FLASH (flash-attn-4, Hopper and later, half precision, 128-token blocks)
and CPU (the C++ template). "auto" takes the fastest one that has been measured for the device; an explicit request
that cannot be met is an error, never a silent fallback.
"""

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def _flash_attn_4_installed() -> bool:
    """Looks for the package without importing it; torch imports it when it compiles."""
    spec = importlib.util.find_spec("flash_attn")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "cute").is_dir() for folder in folders or ())


_FLASH_INSTALLED = _flash_attn_4_installed()


@torch.compiler.assume_constant_result
def compute_capability(device_index: int | None) -> tuple[int, int]:
    """Of a CUDA device; a constant for a traced model."""
    return _capability(torch.cuda.current_device() if device_index is None else device_index)


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


BACKENDS = ("auto", "TRITON", "FLASH", "CPU")
FLASH_HEAD_DIMS = (64, 128)


def flash_problem(
    query: Tensor,
    block_size: int,
    *,
    has_score_mod: bool = False,
    position_in_graph: bool = False,
) -> str | None:
    """Why the FLASH kernel cannot run this call, or None if it can."""
    if query.device.type != "cuda":
        return f"it needs a CUDA GPU, got tensors on {query.device}"
    capability = compute_capability(query.device.index)
    if capability[0] < 9:
        return f"it needs compute capability 9.0 or later (older GPUs ignore the block lists), got {capability}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {query.dtype}"
    if query.shape[-1] not in FLASH_HEAD_DIMS:
        return f"it needs a head_dim of {FLASH_HEAD_DIMS}, got {query.shape[-1]}"
    if block_size != 128:
        return f"it needs block_size 128, got {block_size}"
    if has_score_mod:
        return "it does not take a score_mod here"
    if position_in_graph:
        return "inside a compiled model it cannot read padding or an offset, which the same graph computes"
    if not _FLASH_INSTALLED:
        return "flash-attn-4 is not installed (pip install 'flexprefill-fa[flash]')"
    return None


def resolve_backend(
    backend: str,
    query: Tensor,
    block_size: int,
    *,
    has_score_mod: bool = False,
    has_mask_mod: bool = False,
    position_in_graph: bool = False,
) -> str:
    """The kernel that runs: "TRITON", "FLASH" or "CPU".

    Args:
        backend: what was asked for, see `BACKENDS`.
        query: `[B, Hq, Lq, D]`.
        block_size: tokens per block.
        has_score_mod, has_mask_mod: whether the caller gave one.
        position_in_graph: whether padding or an offset is computed in the graph that runs the attention.

    Raises:
        ValueError: for an unknown name, or an explicit request that this call cannot meet.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    device = query.device.type
    limits = {"has_score_mod": has_score_mod, "position_in_graph": position_in_graph}
    if backend == "FLASH":
        problem = flash_problem(query, block_size, **limits)
        if problem:
            raise ValueError(f"backend='FLASH' cannot run: {problem}")
        return backend
    if backend == "auto":
        if device == "cpu":
            return "CPU"
        # Measured on Hopper; a user's mask_mod may hold what that kernel cannot compile.
        measured = compute_capability(query.device.index)[0] == 9
        if measured and not has_mask_mod and flash_problem(query, block_size, **limits) is None:
            return "FLASH"
        return "TRITON"
    if (backend == "CPU") != (device == "cpu"):
        raise ValueError(f"backend={backend!r} cannot run on tensors on {query.device}")
    return backend


# FlexAttention's tile on the devices where it was measured, by compute capability and head dim: the fastest rows of
# bench/results/tuning.jsonl, which a test compares with this table. Elsewhere torch's own options apply.
TRITON_TILES: dict[tuple[tuple[int, int], int], dict[str, int]] = {
    ((9, 0), 64): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ((9, 0), 128): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    ((9, 0), 256): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
}
_DIVISOR = 128  # of lengths for which the kernel needs no bounds checks


def kernel_options(backend: str, query: Tensor, key: Tensor, block_size: int) -> dict[str, Any]:
    """FlexAttention's kernel_options for a resolved backend; torch's own defaults where nothing was measured.

    Lengths that 128 divides let the Triton kernel drop its bounds checks. A traced model has no lengths yet, and a
    graph that serves every length keeps the checks.
    """
    if backend == "CPU":
        return {}
    if backend == "FLASH":
        return {"BACKEND": "FLASH"}
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    half = query.dtype != torch.float32
    head_dim = query.shape[-1]
    if block_size == 64:  # the kernel's tile must divide the block
        tile = 64 if half and head_dim <= 128 else 32
        options |= {"BLOCK_M": tile, "BLOCK_N": tile}
    elif half:
        options |= TRITON_TILES.get((compute_capability(query.device.index), head_dim), {})
    if not torch.compiler.is_dynamo_compiling() and query.shape[2] % _DIVISOR == 0 and key.shape[2] % _DIVISOR == 0:
        options["IS_DIVISIBLE"] = True
    return options
