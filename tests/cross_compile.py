"""Compile every Triton kernel for a GPU that need not be there, and print the shared memory each one takes.

Run as a script, without TRITON_INTERPRET: `python cross_compile.py 80` prints one JSON line per kernel variant.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexprefill_fa.kernels import (
    block_summaries,
    coverage,
    kept_map,
    last_query,
    line_rows,
    mean_correction,
    merge,
    pooling,
    shared_heads,
    top_lines,
)
from flexprefill_fa.kernels.common import head_slices
from flexprefill_fa.masks.flashprefill.kernels import rows as flash_rows
from flexprefill_fa.masks.flashprefill.kernels import scores as flash_scores
from flexprefill_fa.masks.flexprefill.kernels import paper, pattern, rows
from flexprefill_fa.masks.flexprefill.kernels.pooled_attention import _pooled_attention_kernel, tile_options
from flexprefill_fa.masks.peakprefill.kernels import rows as peak_rows
from flexprefill_fa.masks.peakprefill.kernels.representatives import (
    CLUSTER_STEPS,
    QUERY_ROWS,
    QUERY_STEP,
    ROUND,
    SPLITS,
    _representatives_kernel,
    _squares_kernel,
    tile_width,
    warps_of,
)  # fmt: skip

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
FLOATS = {"scale", "tau", "gamma", "gamma_rest", "log_alpha", "factor", "peak"}
INT_POINTERS = {
    "ranges", "aware", "active", "counts", "values", "cuts", "above", "ties", "partial_counts", "partial_indices",
    "full_counts", "full_indices", "indices",
}  # fmt: skip
FLOAT_POINTERS = {
    "thresholds", "scores", "means", "maxima", "sums", "totals", "lse", "vertical", "slash", "carry", "mean_key",
    "mean_query", "columns", "column_sums", "diagonals", "diagonal_sums", "logits", "distance", "pooled_scores",
    "mass", "diagonal_mass", "factors", "tokens", "best_scores", "squares", "biases", "later", "bias",
}  # fmt: skip
BYTE_POINTERS = {"kept", "chosen", "hit", "diagonal_hit"}
OF_THE_INPUTS = {
    ("_block_mean_kernel", "values"), ("_scores_kernel", "parts"), ("_representatives_kernel", "vectors"),
    ("_rows_kernel", "vectors"),
    *(("_correct_kernel", name) for name in ("mean_key", "mean_value", "out", "result")),
    *(("_summary_kernel", name) for name in ("value", "keys", "values")),
}  # fmt: skip
# The same name for another type of data in one kernel.
EXCEPTIONS = {
    ("_paper_rows_kernel", "columns"): "*i8",
}


def _type_of(kernel: str, name: str) -> str:
    if (kernel, name) in EXCEPTIONS:
        return EXCEPTIONS[kernel, name]
    for names, pointer in ((INT_POINTERS, "*i32"), (FLOAT_POINTERS, "*fp32"), (BYTE_POINTERS, "*i8")):
        if name in names:
            return pointer
    return "fp32" if name in FLOATS else "i32"


def shared_memory(kernel: triton.JITFunction, arch: int, dtype: torch.dtype, options: dict, constants: dict) -> int:
    """Bytes of shared memory of one compiled variant."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "parts" and dtype == torch.float32:
            signature[name] = "*fp16"
        elif name in ("query", "key") or (kernel.fn.__name__, name) in OF_THE_INPUTS:
            signature[name] = TYPES[dtype]
        else:
            signature[name] = _type_of(kernel.fn.__name__, name)
    # Launches find pointers and strides divisible by 16: only then are loads pipelined, through more shared memory.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared


def variants(dtype: torch.dtype, dim: int, block: int):
    """(kernel, launch options, constants) of everything one selection launches."""
    slice_width, slices = head_slices(dim, dtype)
    padded = max(16, triton.next_power_of_2(dim))
    tile = {"D": dim, "SLICE": slice_width, "SLICES": slices, "BLOCK": block}
    yield last_query._lse_kernel, last_query.launch_options(8, slices), tile
    yield last_query._combine_kernel, {}, {"BLOCK": block, "SPLITS": last_query.MAX_SPLITS}
    for heads in (1, 2, 4) if dim == 128 else (4,):  # the widest tile needs most
        group = {"KEYS": last_query.KEYS, "ROWS": min(last_query.KEYS, block // heads), "HEADS": heads}
        yield last_query._sums_kernel, last_query.launch_options(4, slices), {**tile, **group}
    constants = {"D": dim, "BLOCK_D": padded, "BLOCK": block}
    yield pooling._block_mean_kernel, {}, {**constants, "ALL": False}
    yield merge._merge_kernel, {}, {**constants, "KEYS": last_query.KEYS, "ROWS": 32}
    for flag in (True, False):
        yield pattern._pattern_kernel, {"num_warps": 8}, {"BLOCK": block, "WIDTH": 1024, "PUBLISHED": flag}
        short = {"ALL": flag, "LINE_TILE": coverage.SHORT_TILE // 2, "TILE": coverage.SHORT_TILE}
        yield coverage._short_kernel, {"num_warps": coverage.SHORT_WARPS}, {"KEEP_CROSSING": flag, **short}
        tiles = {"ALL": flag, "LINE_TILE": coverage.TILE, "TILE": coverage.TILE}
        constants = {"KEEP_CROSSING": flag, **tiles}
        for kernel in (coverage._digit_kernel, coverage._cut_kernel):
            yield kernel, {"num_warps": coverage.WARPS}, {**constants, "SPLITS": 128}
        yield coverage._ties_kernel, {"num_warps": coverage.WARPS}, tiles
    for q_blocks in (64, 1024):
        shape = tile_options(dim, q_blocks)
        options = {"num_stages": 2, "num_warps": shape.pop("num_warps")}
        yield _pooled_attention_kernel, options, {"D": dim, "BLOCK_D": padded, "BLOCK": block, **shape}
    for flag in (True, False):
        yield top_lines._choose_kernel, {"num_warps": 8}, {"TOKENS": flag, "BLOCK": block, "WIDTH": 1024}
    yield paper._diagonal_windows_kernel, {}, {"BLOCK": block}
    yield paper._column_hits_kernel, {}, {"BLOCK": block}
    yield kept_map._kept_map_kernel, {}, {"CHUNK": kept_map.CHUNK}
    united = {"BLOCK": block, "WIDTH": 1024, "CHUNK": shared_heads.CHUNK, "ALL_PARTIAL": False, "ZERO_TAILS": True}
    yield shared_heads._unite_kernel, {}, united
    shape = mean_correction.launch_options(dim, block)
    options = {"num_warps": shape.pop("num_warps")}
    constants = {"D": dim, "BLOCK_D": padded, "BLOCK": block, "LIMIT": 100, **shape}
    yield mean_correction._correct_kernel, options, constants
    summary = {"D": dim, "BLOCK_D": padded, "BLOCK": block}
    yield block_summaries._later_kernel, {}, {**summary, "ROWS": 16}
    for tilted in (False, True):
        yield block_summaries._summary_kernel, block_summaries.launch_options(dim), {**summary, "TILTED": tilted}
    row = {"HAS_AWARE": True, "BLOCK": block, "WIDTH": 1024, "ALL_PARTIAL": False, "ZERO_TAILS": True}
    yield line_rows._line_rows_kernel, {"num_warps": 4}, {**row, "DENSE": False, "CHUNK": line_rows.CHUNK}
    yield rows._paper_rows_kernel, {"num_warps": 4}, {**row, "LIMITED": True}
    two_parts = dtype == torch.float32
    shape = flash_scores.tile_options(dim, two_parts)
    options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
    padding = {"D": dim, "BLOCK_D": padded}
    if two_parts:
        yield flash_scores._split_kernel, {"num_warps": 4}, {**padding, "ROWS": flash_scores.SPLIT_ROWS}
    yield flash_scores._scores_kernel, options, {**padding, "BLOCK": block, "TWO_PARTS": two_parts, **shape}
    row = {"BLOCK": block, "WIDTH": 1024, "CHUNK": flash_rows.CHUNK, "ALL_PARTIAL": False, "ZERO_TAILS": True}
    yield flash_rows._rows_kernel, {"num_warps": 4}, row
    sampled = {**padding, "SPLITS": SPLITS, "STEP": QUERY_STEP}
    yield _squares_kernel, {}, {**sampled, "ROWS": QUERY_ROWS}
    if dtype == torch.float32 and dim > 128:  # by the plain rule
        return
    width = tile_width(padded, dtype.itemsize)
    tile = {"BLOCK": block, "R": 16, "T": width // 16}
    for flag in (True, False):
        constants = {**sampled, **tile, "ROUND": ROUND, "STEPS": CLUSTER_STEPS, "CLUSTERS": flag, "VARIANCE": True}
        yield _representatives_kernel, {"num_warps": warps_of(padded, dtype.itemsize)}, constants
    row = {"KEYS": width, "WIDTH": 1024, "ALL_PARTIAL": False, "ZERO_TAILS": True}
    yield peak_rows._rows_kernel, peak_rows.launch_options(padded, dtype.itemsize), {**padding, **row, **tile}


def main() -> None:
    arch = int(sys.argv[1])
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 256)):
        for kernel, options, constants in variants(dtype, dim, block := 128):
            first_shape = dim == 128 and dtype is torch.bfloat16
            if not first_shape and not {"SLICE", "ROWS", "TWO_PARTS", "MOST"} & constants.keys():
                continue  # holds no tile of the head dim: its memory stays the same
            shared = shared_memory(kernel, arch, dtype, options, constants)
            name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
            print(json.dumps({"kernel": name, "dtype": str(dtype), "dim": dim, "block": block, "shared": shared}))


if __name__ == "__main__":
    main()
