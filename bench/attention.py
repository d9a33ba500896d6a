"""What attention over selected blocks costs, beside dense attention on the same inputs: checked, then timed."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import Reference, reference, verify
from bench.planning import YARDSTICK, Plan
from bench.synthetic import chunk_selection
from bench.timing import Stopwatch, Times, described, significant
from flexprefill_fa import BlockSelection, select_blocks, sparse_prefill_attention
from flexprefill_fa.attention import block_sparse_attention
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.cost_model import causal_flop, prefers_dense
from flexprefill_fa.dense import causal_attention, fastest_dense
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row

_BLOCK = 128  # of synthetic selections
Calls = dict[str, Callable[[], Any]]
"""What to time, by the field of its milliseconds."""


class LengthBenchmark:
    """All rows of one length n, of queries and keys alike; `note` is called with a line about what is left out."""

    kind = "attention"

    def __init__(self, plan: Plan, length: int, note: Callable[[str], None]) -> None:
        self.plan, self.length, self.note = plan, length, note
        self.inputs, found = plan.inputs(length)
        self.watch = Stopwatch(plan.device, plan.repeats, plan.seconds)
        same = ("heads", "kv_heads", "head_dim", "workload", "seed")
        shape = {"length": length, "batch": 1, **{name: getattr(plan, name) for name in same}}
        self.conditions = described(self.kind, plan.device, plan.dtype, **shape, **found)
        self.dense_rows: dict[str, Row] = {}  # by kernel
        self.references: dict[Any, Reference] = {}  # of each config's or density's selection; of None, dense

    def rows(self) -> Iterator[Row]:
        """The rows, dense first; a row whose check failed has `error` and no times."""
        with torch.no_grad(), self.plan.on_device():
            self.references[None] = reference(self.inputs, None)
            for kernel in self.plan.kernels:
                yield from self._dense_row(kernel)
            for config in self.plan.configs:
                yield from self.selector_rows(config)
            for density in self.plan.densities:
                yield from self._synthetic_rows(density)

    def _dense_row(self, kernel: str) -> Iterator[Row]:
        call = partial(causal_attention, *self.inputs, kernel)
        row: Row = {**self.conditions, "path": "dense", "selector": None, "backend": None, "kernel": kernel}
        try:
            row |= self._measured({"total_ms": call}, self.references[None], ValueError)
        except ValueError as error:  # what causal_attention says of a kernel that does not fit
            self.note(f"{self.length} tokens: dense {kernel} cannot run: {first_line(error)}")
            return
        if "error" not in row:
            flop = causal_flop(batch=row["batch"], heads=row["heads"], head_dim=row["head_dim"], tokens=self.length)
            row["tflops"] = significant(flop / row["total_ms"] / 1e9)
            self.dense_rows[kernel] = row
        yield row

    def selector_rows(self, config: Any) -> Iterator[Row]:
        """Those of a selector, one for each backend."""
        query, key, _ = self.inputs
        select = partial(select_blocks, query, key, config)
        selection = select()
        sparse = self.references[config] = reference(self.inputs, selection)
        kept = _kept(selection, sparse)
        taken = self.watch.graph(select)  # the same for every backend
        for backend in self.plan.backends:
            kernel = resolve_backend(backend, query, config.block_size)
            goes_dense = backend == "auto" and prefers_dense(query, key, config, kernel)
            row: Row = {**self.conditions, "path": "dense" if goes_dense else "sparse", "selector": config.name}
            row |= {"settings": dataclasses.asdict(config), "backend": backend, "kernel": kernel}
            way: Any = {"dense": "auto" if backend == "auto" else "never", "backend": backend}
            calls: Calls = {"total_ms": partial(sparse_prefill_attention, *self.inputs, config, **way)}
            if goes_dense:
                row |= {"kernel": fastest_dense(query), **self._measured(calls, self.references[None])}
                yield row | self.speedups(row)
                continue
            attend = partial(block_sparse_attention, *self.inputs, selection, backend=backend)
            calls["attend_ms"] = attend
            if self.plan.mean_correction:
                calls["corrected_ms"] = partial(attend, mean_correction=True)
                calls["tilted_ms"] = partial(attend, mean_correction="tilted")
            yield self._sparse_row(row | kept, calls, selection, sparse, select_ms=taken)

    def _synthetic_rows(self, density: float) -> Iterator[Row]:
        selection = self.random_blocks(density)
        sparse = self.references[density] = reference(self.inputs, selection)
        row: Row = {**self.conditions, "path": "sparse", "selector": "synthetic", "settings": {"density": density}}
        row |= _kept(selection, sparse)
        for backend in self.plan.backends:
            named = {**row, "backend": backend, "kernel": resolve_backend(backend, self.inputs.query, _BLOCK)}
            attend = partial(block_sparse_attention, *self.inputs, selection, backend=backend)
            yield self._sparse_row(named, {"attend_ms": attend}, selection, sparse)

    def random_blocks(self, density: float) -> BlockSelection:
        """A synthetic selection."""
        plan = self.plan
        return chunk_selection(self.length, self.length, plan.heads, density, device=plan.device, seed=plan.seed)

    def _sparse_row(
        self, row: Row, calls: Calls, selection: BlockSelection, expected: Reference, **taken: Times
    ) -> Row:
        """A row with its times, those that were `taken` already too, and what follows from them."""
        row = row | self._measured(calls, expected, **taken)
        if "error" in row:
            return row
        # Scores and values of kept blocks, the masked half of a diagonal block included.
        flop = int(selection.kept_blocks().sum()) * 4 * selection.block_size**2 * self.inputs.query.shape[-1]
        tflops, dense = significant(flop / row["attend_ms"] / 1e9), self.dense_rows.get(row["kernel"])
        row |= {"tflops": tflops, "share_of_dense_tflops": dense and round(tflops / dense["tflops"], 4)}
        return row | self.speedups(row)

    def _measured(self, calls: Calls, expected: Reference, *let_through: type[Exception], **taken: Times) -> Row:
        """The times of calls, after checking those that compute attention; of a wrong one or that raises, `error`."""
        found: Row = {}
        for name in ("total_ms", "attend_ms"):
            if name not in calls:
                continue
            try:
                found = verify(calls[name](), expected)
            except (torch.OutOfMemoryError, *let_through):
                raise
            except Exception as error:  # the other rows of a long run are still worth having
                self.note(traceback.format_exc())
                return {"error": f"{type(error).__name__}: {first_line(error)}"}
            if "error" in found:
                return found
        return found | self.times(calls, **taken)

    def times(self, calls: Calls, **taken: Times) -> Row:
        """The times of calls, beside those that were taken before.

        On a GPU a whole call is timed by the wall clock too; on a CPU every time is one.
        """
        row: Row = {}
        times = {name: self.watch.graph(call) for name, call in calls.items()} | taken
        if self.plan.device.type == "cuda" and "total_ms" in calls:
            times["total_eager_ms"] = self.watch.eager(calls["total_ms"])
            row["peak_total_bytes"] = self._peak_bytes(calls["total_ms"])
        row["repeats"] = min(one.repeats for one in times.values())
        row["timed_by"] = {name: one.timed_by for name, one in times.items()}
        for name, one in times.items():
            row |= one.fields(name)
        return row

    def _peak_bytes(self, call: Callable[[], object]) -> int:
        """GPU memory of one eager call, its inputs and its output included."""
        others = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in self.inputs)
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others

    def speedups(self, row: Row) -> Row:
        """Of a row against dense attention on the same inputs; None for what did not run."""
        if "error" in row:
            return {}
        own, name = row.get("total_ms", row.get("attend_ms")), YARDSTICK[self.plan.device.type]
        gains = {kernel: round(found["total_ms"] / own, 3) for kernel, found in self.dense_rows.items()}
        return {f"speedup_{name}": gains.get(name), "speedup_best_dense": min(gains.values(), default=None)}


def spread(name: str, per_head: Tensor, ends: str) -> Row:
    """The mean of a quantity over heads, and its "min", "max" or both ends."""
    found = {name: per_head.mean(), f"{name}_min": per_head.min(), f"{name}_max": per_head.max()}
    return {field: round(value.item(), 5) for field, value in found.items() if field == name or field[-3:] in ends}


def _kept(selection: BlockSelection, found: Reference) -> Row:
    return spread("density", selection.density(), "min max") | spread("recall", found.recall, "min")
