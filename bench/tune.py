"""Which tile FlexAttention's Triton kernel likes best on this GPU, for each head dim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.synthetic import chunk_selection
from bench.timing import Stopwatch, described
from flexprefill_fa.region import Call, run_attend
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row

DENSITIES = (0.06, 0.25)
_LENGTH, _BLOCK = 32768, 128
_REPEATS, _SECONDS = 10, 2.0
_HEADS, _KV_HEADS, _HEAD_DIMS = 32, 8, (64, 128, 256)
_SAME = 0.005  # relative L2 distance of two tiles' outputs
_NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
CANDIDATES: tuple[tuple[int, ...], ...] = (
    (),  # torch's own choice
    (128, 128, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 4, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 32, 8, 2),
)


def tuning_rows() -> Iterator[Row]:
    """One row per head dim and candidate: time of attention over synthetic selections of bfloat16 heads.

    A candidate that does not compile, or whose output is not that of torch's own tile, has `error` and no times.
    """
    device, dtype = torch.device("cuda"), torch.bfloat16
    watch = Stopwatch(device, _REPEATS, _SECONDS)
    selections = [chunk_selection(_LENGTH, _LENGTH, _HEADS, density, device=device) for density in DENSITIES]
    for head_dim in _HEAD_DIMS:
        heads = (_HEADS, _KV_HEADS, _KV_HEADS)
        tensors = [torch.randn(1, count, _LENGTH, head_dim, dtype=dtype, device=device) for count in heads]
        expected: dict[float, Tensor] = {}
        for candidate in CANDIDATES:
            tile = dict(zip(_NAMES, candidate, strict=False))
            shape = {"length": _LENGTH, "heads": _HEADS, "kv_heads": _KV_HEADS, "head_dim": head_dim}
            row = described("tuning", device, dtype, **shape, tile=tile)
            how = Call(_BLOCK, options={"BACKEND": "TRITON", "IS_DIVISIBLE": True, **tile})
            try:
                for density, selection in zip(DENSITIES, selections, strict=True):
                    call = partial(run_attend, *tensors, selection.lists, None, None, how)
                    out = call().float()
                    difference = (out - expected.setdefault(density, out)).norm() / out.norm()
                    if not difference < _SAME:
                        raise ValueError(f"its output differs by {difference.item():.3g} from torch's own tile's")
                    row |= watch.graph(call).fields(f"attend_{density:g}_ms")
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # too much shared memory, say: the other candidates still count
                row["error"] = f"{type(error).__name__}: {first_line(error)[:200]}"
            yield row


def best_tiles(rows: Sequence[Row]) -> dict[tuple[tuple[int, int], int], dict[str, int]]:
    """The tile with the least product of times, by compute capability and head dim."""
    best: dict[tuple[tuple[int, int], int], tuple[float, dict[str, int]]] = {}
    for row in rows:
        if row.get("kind") == "tuning" and "error" not in row:
            product = math.prod(row[f"attend_{density:g}_ms"] for density in DENSITIES)
            where = (row["capability"][0], row["capability"][1]), row["head_dim"]
            best[where] = min(best.get(where, (math.inf, {})), (product, row["tile"]), key=lambda found: found[0])
    return {where: tile for where, (_, tile) in best.items()}
