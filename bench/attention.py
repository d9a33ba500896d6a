"""What attention over selected blocks costs, beside dense attention on the same inputs: checked, then timed."""

from __future__ import annotations

import dataclasses
import functools
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.check import SAMPLED_ROWS, Reference, Verdict, reference, verify
from bench.inputs import make_inputs
from bench.synthetic import random_selection
from bench.timing import Stopwatch, Times
from flexprefill_fa import BlockSelection, select_blocks, sparse_prefill_attention
from flexprefill_fa.attention import block_sparse_attention
from flexprefill_fa.backends import resolve_backend
from flexprefill_fa.cost_model import causal_flop, prefers_dense
from flexprefill_fa.dense import causal_attention, fastest_dense
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row, environment

DENSE_KERNELS = {"cuda": ("sdpa", "sdpa_flash", "sdpa_cudnn", "FLASH", "TRITON"), "cpu": ("sdpa", "CPU")}
YARDSTICK = {"cuda": "sdpa_flash", "cpu": "sdpa"}
"""The dense kernel that most published speed-ups are measured against."""

_BLOCK = 128  # of FlexAttention over all causal blocks, and of synthetic selections


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        configs: selectors. densities: of synthetic selections.
        backends: for each of those.
        heads, kv_heads, head_dim, batch, dtype: of the inputs; the needle model has its own heads and head_dim.
        workload: "sharpened", "fixed" or "needle".
        layer: of the needle model.
        device, seed: where, and of what.
        repeats: measurements of each time, fewer where they would take longer than `seconds`.
        dense: whether to time the dense kernels too.
        mean_correction: whether to time attention with mean correction too.
    """

    configs: Sequence[Any]
    densities: Sequence[float]
    backends: Sequence[str]
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: torch.dtype
    workload: str
    layer: int
    device: torch.device
    seed: int
    repeats: int
    seconds: float
    dense: bool
    mean_correction: bool = False

    @property
    def kernels(self) -> Sequence[str]:
        """Dense kernels to time."""
        return DENSE_KERNELS[self.device.type] if self.dense else ()

    def steps(self) -> int:
        """Rows per length."""
        return len(self.kernels) + len(self.backends) * (len(self.configs) + len(self.densities))


class LengthBenchmark:
    """All rows of one length.

    Args:
        plan: what to measure.
        length: tokens n, queries and keys alike.
        note: called with a line about what is left out.
    """

    def __init__(self, plan: Plan, length: int, note: Callable[[str], None]) -> None:
        self.plan = plan
        self.length = length
        self.note = note
        self.inputs, described = make_inputs(plan, length)
        self.watch = Stopwatch(plan.device, plan.repeats, plan.seconds)
        batch, heads, _, head_dim = self.inputs.query.shape
        self.conditions: Row = {
            "kind": "attention",
            "device": plan.device.type,
            **environment(plan.device),
            "length": length,
            "batch": batch,
            "heads": heads,
            "kv_heads": self.inputs.key.shape[1],
            "head_dim": head_dim,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "workload": plan.workload,
            **described,
            "seed": plan.seed,
        }
        self.dense_ms: dict[str, float] = {}
        self.dense_tflops: dict[str, float] = {}
        self.references: dict[Any, Reference] = {}  # of each config's selection

    def rows(self) -> Iterator[Row]:
        """The rows, dense first; a row whose check failed has `error` and no times."""
        with torch.no_grad(), self._on_device():
            dense = reference(self.inputs, None)
            for kernel in self.plan.kernels:
                row = self._dense(kernel, dense)
                if row is not None:
                    yield row
            for config in self.plan.configs:
                yield from self._selector(config, dense)
            for density in self.plan.densities:
                yield from self._synthetic(density)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.plan.device) if self.plan.device.type == "cuda" else nullcontext()

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs.query, self.inputs.key, self.inputs.value

    def _dense(self, kernel: str, dense: Reference) -> Row | None:
        def call() -> Tensor:
            return causal_attention(*self._tensors, kernel)

        row: Row = {**self.conditions, "path": "dense", "selector": None, "backend": None, "kernel": kernel}
        try:
            verdict = verify(call(), dense)
        except torch.OutOfMemoryError:
            raise
        except ValueError as error:  # what causal_attention says of a kernel that does not fit
            self.note(f"{self.length} tokens: dense {kernel} cannot run: {first_line(error)}")
            return None
        except Exception as error:  # a competitor that should have run: its row says so
            self.note(traceback.format_exc())
            return {**row, "error": f"{type(error).__name__}: {first_line(error)}"}
        row |= _checked(verdict)
        if verdict.problem:
            return row
        row |= self._peak(call)
        total = self.watch.graph(call)
        flop = causal_flop(batch=row["batch"], heads=row["heads"], head_dim=row["head_dim"], tokens=self.length)
        self.dense_ms[kernel] = total.median
        self.dense_tflops[kernel] = _tflops(flop, total)
        row |= self._timed(total_ms=total, **self._eager(call))
        row["tflops"] = round(self.dense_tflops[kernel], 2)
        return row

    def _selector(self, config: Any, dense: Reference) -> Iterator[Row]:
        query, key, value = self._tensors

        def select() -> BlockSelection:
            return select_blocks(query, key, config)

        selection = select()
        sparse = self.references[config] = reference(self.inputs, selection)
        select_times = None
        for backend in self.plan.backends:
            kernel = resolve_backend(backend, query, config.block_size)
            goes_dense = backend == "auto" and prefers_dense(query, key, config, kernel)

            def total(backend: str = backend) -> Tensor:
                dense = "auto" if backend == "auto" else "never"
                return sparse_prefill_attention(query, key, value, config, dense=dense, backend=backend)

            def attend(backend: str = backend, *, mean_correction: bool = False) -> Tensor:
                return block_sparse_attention(
                    query, key, value, selection, backend=backend, mean_correction=mean_correction
                )

            row: Row = {**self.conditions, "path": "dense" if goes_dense else "sparse", "selector": config.name}
            row |= {"settings": dataclasses.asdict(config), "backend": backend}
            row |= {"kernel": fastest_dense(query) if goes_dense else kernel}
            if goes_dense:
                row["would_be_density"] = _kept(selection, sparse)["density"]
            else:
                row |= {**_kept(selection, sparse), "query_aware_heads": _query_aware(selection, config)}
            row |= self._check((total,), dense) if goes_dense else self._check((total, attend), sparse)
            if "error" not in row:
                row |= self._peak(total)
                times = {"total_ms": self.watch.graph(total), **self._eager(total)}
                if not goes_dense:
                    select_times = select_times or self.watch.graph(select)
                    times |= {"select_ms": select_times, "attend_ms": self.watch.graph(attend)}
                    if self.plan.mean_correction:
                        times["corrected_ms"] = self.watch.graph(functools.partial(attend, mean_correction=True))
                    row |= self._throughput(selection, times["attend_ms"], kernel)
                row |= self._timed(**times) | self._speedups(times["total_ms"])
            yield row

    def _synthetic(self, density: float) -> Iterator[Row]:
        query, key, value = self._tensors
        selection = random_selection(
            self.length,
            query.shape[1],
            density,
            batch=query.shape[0],
            block_size=_BLOCK,
            device=query.device,
            seed=self.plan.seed,
        )
        sparse = reference(self.inputs, selection)
        for backend in self.plan.backends:
            kernel = resolve_backend(backend, query, _BLOCK)

            def attend(backend: str = backend) -> Tensor:
                return block_sparse_attention(query, key, value, selection, backend=backend)

            row: Row = {**self.conditions, "path": "sparse", "selector": "synthetic", "settings": {"density": density}}
            row |= {"backend": backend, "kernel": kernel, **_kept(selection, sparse)}
            row |= self._check((attend,), sparse)
            if "error" not in row:
                row |= self._peak(attend)
                times = self.watch.graph(attend)
                row |= self._throughput(selection, times, kernel) | self._timed(attend_ms=times)
                row |= self._speedups(times)
            yield row

    def _eager(self, call: Callable[[], object]) -> dict[str, Times]:
        """The whole call by the wall clock, on a GPU; on a CPU every time is one."""
        return {"total_eager_ms": self.watch.eager(call)} if self.plan.device.type == "cuda" else {}

    def _check(self, calls: Sequence[Callable[[], Tensor]], expected: Reference) -> Row:
        """The fields of the first call whose output is wrong, else of the last; a call that raises is wrong too."""
        found: Row = {}
        for call in calls:
            try:
                found = _checked(verify(call(), expected))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the other rows of a long run are still worth having
                self.note(traceback.format_exc())
                return {"error": f"{type(error).__name__}: {first_line(error)}"}
            if "error" in found:
                break
        return found

    def _timed(self, **times: Times) -> Row:
        row: Row = {"repeats": min(taken.repeats for taken in times.values())}
        row["timed_by"] = {name: taken.timed_by for name, taken in times.items()}
        for name, taken in times.items():
            row |= taken.fields(name)
        return row

    def _speedups(self, times: Times) -> Row:
        """Against dense attention on the same inputs; None for what did not run."""
        yardstick = self.dense_ms.get(YARDSTICK[self.plan.device.type])
        best = min(self.dense_ms, key=self.dense_ms.__getitem__, default=None)
        return {
            f"speedup_{YARDSTICK[self.plan.device.type]}": yardstick and round(yardstick / times.median, 3),
            "speedup_best_dense": best and round(self.dense_ms[best] / times.median, 3),
            "best_dense": best,
            "dense_kernels": sorted(self.dense_ms),
        }

    def _throughput(self, selection: BlockSelection, attend: Times, kernel: str) -> Row:
        flop = int(selection.kept_blocks().sum()) * self._block_flop(selection.block_size)
        tflops = _tflops(flop, attend)
        dense = self.dense_tflops.get(kernel)
        return {"tflops": round(tflops, 2), "share_of_dense_tflops": dense and round(tflops / dense, 4)}

    def _block_flop(self, block_size: int) -> int:
        """Of one block, scores and values, the masked half of a diagonal block included."""
        return 4 * block_size**2 * self.inputs.query.shape[-1]

    def _peak(self, call: Callable[[], object]) -> Row:
        """GPU memory that one eager call takes beyond its inputs, and with them."""
        if self.plan.device.type != "cuda":
            return {}
        call()
        torch.cuda.synchronize(self.plan.device)
        before = torch.cuda.memory_allocated(self.plan.device)
        torch.cuda.reset_peak_memory_stats(self.plan.device)
        call()
        torch.cuda.synchronize(self.plan.device)
        above = torch.cuda.max_memory_allocated(self.plan.device) - before
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
        return {"peak_bytes": above, "peak_total_bytes": above + inputs}


def _checked(verdict: Verdict) -> Row:
    error = verdict.error if math.isfinite(verdict.error) else None
    found: Row = {"check_error": error, "check_allowed": verdict.allowed}
    if verdict.problem is not None:
        return {**found, "error": verdict.problem}
    if verdict.sparse_share is not None:
        found["check_sparse_share"] = round(verdict.sparse_share, 4)
    return found


def _tflops(flop: int, times: Times) -> float:
    return flop / times.median / 1e9


def _kept(selection: BlockSelection, found: Reference) -> Row:
    density = selection.density()
    return {
        "density": round(density.mean().item(), 5),
        "density_min": round(density.min().item(), 5),
        "density_max": round(density.max().item(), 5),
        "recall": round(found.recall.mean().item(), 5),
        "recall_min": round(found.recall.min().item(), 5),
        "recall_rows": min(SAMPLED_ROWS, selection.q_len),
    }


def _query_aware(selection: BlockSelection, config: Any) -> int | None:
    """Number of heads that FlexPrefill finds query-aware; None where a selector or a short prompt has no such test."""
    tau = getattr(config, "tau", None)
    if tau is None or selection.q_len <= config.dense_tokens:
        return None
    return int((selection.js_distance < tau).sum())
