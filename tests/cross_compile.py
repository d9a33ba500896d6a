"""Compile every Triton kernel for a GPU that need not be there, and print the shared memory each one takes.

Run as a script, without TRITON_INTERPRET: `python cross_compile.py 80` prints one JSON line per kernel variant.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexprefill_fa.kernels import coverage, pooling
from flexprefill_fa.kernels.common import head_slices
from flexprefill_fa.masks.flexprefill.kernels import last_query, paper, pattern, published, rows
from flexprefill_fa.masks.flexprefill.kernels.pooled_attention import ROWS, _pooled_attention_kernel, columns

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
FLOATS = {"scale", "tau"}
POINTERS = {
    "ranges": "*i32", "aware": "*i32", "active": "*i32", "thresholds": "*fp32", "counts": "*i32", "member": "*i8",
    "scores": "*fp32", "means": "*fp32", "maxima": "*fp32", "sums": "*fp32", "vertical": "*fp32", "slash": "*fp32",
    "slash_upper": "*fp32", "slash_lower": "*fp32", "mean_key": "*fp32", "mean_query": "*fp32", "column_sums": "*fp32",
    "distance": "*fp32", "diagonal_sums": "*fp32", "column_tokens": "*i32", "diagonal_tokens": "*i32",
    "columns": "*i8", "diagonals": "*i8", "pooled": "*i8", "pooled_scores": "*fp32", "mass": "*fp32", "hit": "*i8",
    "diagonal_mass": "*fp32", "diagonal_hit": "*i8", "partial_counts": "*i32", "partial_indices": "*i32",
    "full_counts": "*i32", "full_indices": "*i32",
}  # fmt: skip


def shared_memory(kernel: triton.JITFunction, arch: int, dtype: torch.dtype, options: dict, constants: dict) -> int:
    """Bytes of shared memory of one compiled variant."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("query", "key", "values"):
            signature[name] = TYPES[dtype]
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in FLOATS else "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared


def variants(dtype: torch.dtype, dim: int, block: int):
    """(kernel, launch options, constants) of everything one selection launches."""
    slice_width, slices = head_slices(dim, dtype)
    padded = max(16, triton.next_power_of_2(dim))
    tile = {"D": dim, "SLICE": slice_width, "SLICES": slices, "BLOCK": block, "TILES": last_query.TILES}
    yield last_query._lse_kernel, last_query.launch_options(slices), tile
    yield last_query._sums_kernel, last_query.launch_options(slices), tile
    yield pooling._block_mean_kernel, {}, {"D": dim, "BLOCK_D": padded, "BLOCK": block}
    for flag in (True, False):
        constants = {"D": dim, "BLOCK_D": padded, "BLOCK": block, "TILE": pattern.TILE, "PUBLISHED": flag}
        yield pattern._pattern_kernel, {}, constants
        constants = {"KEEP_CROSSING": flag, "MARK": flag, "TILE": 4096}
        yield coverage._coverage_kernel, {"num_warps": 8}, constants
    constants = {"D": dim, "BLOCK_D": padded, "BLOCK": block}
    yield _pooled_attention_kernel, {"num_stages": 2}, {**constants, "ROWS": ROWS, "COLUMNS": columns(dim)}
    yield published._diagonal_sums_kernel, {}, {"BLOCK": block}
    yield published._choose_kernel, {"num_warps": 8}, {"BLOCK": block, "WIDTH": 1024}
    yield paper._diagonal_windows_kernel, {}, {"BLOCK": block}
    yield paper._column_hits_kernel, {}, {"BLOCK": block}
    row = {"HAS_AWARE": True, "BLOCK": block, "WIDTH": 1024, "ALL_PARTIAL": False, "ZERO_TAILS": True, "DENSE": False}
    yield rows._published_rows_kernel, {"num_warps": 4}, row
    yield rows._paper_rows_kernel, {"num_warps": 4}, {**row, "LIMITED": True}


def main() -> None:
    arch = int(sys.argv[1])
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 256)):
        for kernel, options, constants in variants(dtype, dim, block := 128):
            first_shape = dim == 128 and dtype is torch.bfloat16
            if not first_shape and "SLICE" not in constants and "ROWS" not in constants:
                continue  # holds no tile of the head dim: its memory stays the same
            shared = shared_memory(kernel, arch, dtype, options, constants)
            name = kernel.fn.__name__
            print(json.dumps({"kernel": name, "dtype": str(dtype), "dim": dim, "block": block, "shared": shared}))


if __name__ == "__main__":
    main()
