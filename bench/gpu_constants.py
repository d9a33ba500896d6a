"""What the library has to know of a GPU: FlexAttention's best tiles, tried, and the cost model's rates, fitted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy
import torch
from torch import Tensor

from bench.synthetic import chunk_selection
from bench.timing import Stopwatch, described
from flexprefill_fa import get_selector
from flexprefill_fa.cost_model import Rates, causal_flop
from flexprefill_fa.region import Call, run_attend
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row

_LONGEST = 32768  # tokens of the rows that rates are fitted to: the decision is made among short prompts
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


def _flop(row: Row) -> int:
    return causal_flop(batch=row["batch"], heads=row["heads"], head_dim=row["head_dim"], tokens=row["length"])


def best_dense(rows: Sequence[Row], backend: str) -> dict[int, Row]:
    """The fastest dense row of each length that "auto" could take beside a backend.

    It takes TRITON only where FLASH cannot run, so flash-attn-4's kernel does not count beside it.
    """
    dense = [row for row in rows if row["path"] == "dense" and row["selector"] is None and "total_ms" in row]
    dense = [row for row in dense if row["kernel"] not in ("FLASH", "flash_attn_4") or backend == "FLASH"]
    return {row["length"]: row for row in sorted(dense, key=lambda row: -row["total_ms"])}  # the last is the fastest


def _costs(milliseconds: Sequence[float], *amounts: Sequence[float]) -> list[float]:
    """Launch and ms for one of each amount, none negative, with the least relative error."""
    columns = numpy.stack([numpy.ones(len(milliseconds)), *map(numpy.asarray, amounts)], 1)
    columns = columns / numpy.asarray(milliseconds)[:, None]
    found, used = numpy.zeros(columns.shape[1]), numpy.arange(columns.shape[1])
    while True:
        found[:] = 0
        found[used] = numpy.linalg.lstsq(columns[:, used], numpy.ones(len(columns)), rcond=None)[0]
        if found.min() >= 0:
            return found.tolist()
        used = used[used != found.argmin()]


def fit_rates(rows: Sequence[Row], selector: str, backend: str) -> Rates:
    """Fit the model to the attention rows of one device and head dim, of the selector's default settings."""
    dense = [row for row in best_dense(rows, backend).values() if row["length"] <= _LONGEST]
    same: Row = {"path": "sparse", "selector": selector, "backend": backend}
    same["settings"] = dataclasses.asdict(get_selector(selector)())
    sparse = [row for row in rows if row | same == row and "select_ms" in row and row["length"] <= _LONGEST]
    lengths = {row["length"] for row in sparse} & {row["length"] for row in dense}
    if len(lengths) < 2:
        raise ValueError(f"a fit needs dense and {backend} rows of two lengths, got {sorted(lengths)}")
    dense_launch, dense_slope = _costs([row["total_ms"] for row in dense], [_flop(row) for row in dense])
    if not dense_slope:
        found = [row["total_ms"] for row in dense]
        raise ValueError(f"a fit needs dense times that rise with the length, got {found} ms")
    select_launch, select_slope, select_flop = _costs(
        [row["select_ms"] for row in sparse],
        [row["length"] * row["batch"] * row["heads"] for row in sparse],
        [_flop(row) for row in sparse],
    )
    attend_launch, attend_slope = _costs(
        [row["total_ms"] - row["select_ms"] for row in sparse], [row["density"] * _flop(row) for row in sparse]
    )
    return Rates(
        dense_launch_ms=round(dense_launch, 4),
        dense_tflops=round(1e-9 / dense_slope, 1),
        select_launch_ms=round(select_launch, 4),
        select_ns=round(select_slope * 1e6, 4),
        select_share=round(select_flop / dense_slope, 5),
        attend_launch_ms=round(attend_launch, 4),
        attend_tflops=round(1e-9 / attend_slope, 1),
    )
