"""The constants of the cost model, from measured rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy

from flexprefill_fa import get_selector
from flexprefill_fa.cost_model import Rates, causal_flop
from flexprefill_fa.tools.rows import Row

_LONGEST = 32768  # tokens


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
    """Fit the model to the attention rows of one device and head dim, of the selector's default settings.

    Rows of more than `_LONGEST` tokens are left out, because the decision is made among short prompts.
    """
    dense = [row for row in best_dense(rows, backend).values() if row["length"] <= _LONGEST]
    same: Row = {"path": "sparse", "selector": selector, "backend": backend}
    same["settings"] = dataclasses.asdict(get_selector(selector)())
    sparse = [row for row in rows if row | same == row and "select_ms" in row and row["length"] <= _LONGEST]
    lengths = {row["length"] for row in sparse} & {row["length"] for row in dense}
    if len(lengths) < 2:
        raise ValueError(f"a fit needs dense and {backend} rows of two lengths, got {sorted(lengths)}")
    dense_launch, dense_slope = _costs([row["total_ms"] for row in dense], [_flop(row) for row in dense])
    if not dense_slope:
        raise ValueError(
            f"a fit needs dense times that rise with the length, got {[row['total_ms'] for row in dense]} ms"
        )
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
