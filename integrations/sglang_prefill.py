"""Sparse prefill of one engine of SGLang: its layers, the plan of a step, and what a layer does in it."""

from __future__ import annotations

import logging
import time
import weakref
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc  # pyright: ignore[reportMissingImports]
from sglang.srt.utils.common import DynamicGradMode  # pyright: ignore[reportMissingImports]
from torch import Tensor

from flexprefill_fa.selection import BlockSelection

from .engine_counts import DensityCounter, DensityLog
from .engine_layer import FAILURES_IN_A_ROW, SparseLayer
from .engine_log import EngineLog
from .engine_paged import GatherBuffer, attend_paged, warm_up
from .engine_plan import take
from .engine_settings import LEAST_PREFILL_TOKENS, Settings
from .sglang_plan import SparseStep, is_prefill, sparse_step, split_step, step_problem

log = EngineLog("sglang.flexprefill_fa")


class SparsePrefill:
    """What a backend of SGLang's has for sparse prefill.

    Args:
        runner: SGLang's `ModelRunner`.
        rest: a second parent backend, which plans the other requests of a step with sparse chunks: a backend holds the
            plan of one step.
        parent: the parent's name.
        settings: of the engine.
        names: the layers that can run sparse, `RadixAttention` -> name.

    Attributes:
        layers: `RadixAttention` -> what it counts and whether it is off.
        step: the step that was planned last, None where nothing in it runs sparse.
    """

    def __init__(self, runner: Any, rest: Any, parent: str, settings: Settings, names: dict[Any, str]) -> None:
        self.step: SparseStep | None = None
        self.layers = {layer: SparseLayer() for layer in names}
        self._counters = [DensityCounter() for _ in names]
        for state, counter in zip(self.layers.values(), self._counters, strict=True):
            state.sparse_counter = counter
        self._engine = weakref.ref(runner)  # for what is said once
        self._rest, self._parent, self._settings, self._names = rest, parent, settings, names
        self._dtype, self._pool = runner.dtype, runner.token_to_kv_pool
        self._req_to_token = runner.req_to_token_pool.req_to_token
        self._device = self._req_to_token.device
        self._density = DensityLog(self._counters, settings.log_seconds)
        self._buffers: dict[tuple[int, int], GatherBuffer] = {}
        self._failures = 0  # in a row, of planning
        self._plans = True

    def warm_up(self, runner: Any, rows: int) -> None:
        """Compile and take our memory before the first request; one layer of each shape does it for all.

        Args:
            runner: SGLang's `ModelRunner`.
            rows: the most queries of a chunk.
        """
        start, most, chunks, seen = time.monotonic(), runner.model_config.context_len, 0, set()
        for layer, state in self.layers.items():
            shape = (layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim, layer.scaling)
            if shape in seen:
                continue
            seen.add(shape)
            query = torch.empty(rows, layer.tp_q_head_num, layer.head_dim, dtype=runner.dtype, device=self._device)
            with DynamicGradMode():  # compiled code is for the mode that the engine runs in
                chunks += warm_up(
                    query, layer.tp_k_head_num, most, most, self._settings, layer.scaling, self._buffer(layer),
                    state.attend,
                )  # fmt: skip
        log.logger.info("sparse prefill: compiled and ran %d chunks in %.1f s", chunks, time.monotonic() - start)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Of each layer, see `sglang.statistics`."""
        return {name: self.layers[layer].statistics() for layer, name in self._names.items()}

    def plan(self, batch: Any, metadata: Any) -> None:
        """Plan a step, a `ForwardBatch`; `metadata` is what the parent made of it."""
        self.step = self._plan(batch, metadata) if self._plans and is_prefill(batch) else None

    def _plan(self, batch: Any, metadata: Any) -> SparseStep | None:
        """None where nothing runs sparse; and where this failed, for an exception here would end the engine."""
        try:
            line = self._density.poll(time.monotonic())
            if line is not None:
                log.logger.info("%s", line)
            if all(state.sparse_off for state in self.layers.values()):
                self._plans = False
                return None
            problem = step_problem(batch, metadata)
            if problem is not None:
                if len(batch.seq_lens) and (batch.extend_num_tokens or 0) >= LEAST_PREFILL_TOKENS:
                    text = f"sparse prefill: steps with {problem} are served by {self._parent} alone"
                    log.once(self._engine() or self, text, logging.WARNING)
                return None
            split, declined = split_step(batch, self._settings)
            for counter in self._counters if declined else ():
                counter.declined += declined
            step = None
            if split is not None:
                step = sparse_step(batch, split, self._req_to_token, self._rest.init_forward_metadata)
        except Exception:
            self._failures += 1
            log.logger.exception("sparse prefill failed to split a step; %s serves it", self._parent)
            if self._failures >= FAILURES_IN_A_ROW:
                self._plans = False
                text = "sparse prefill is off until the engine ends: %d steps failed in a row"
                log.logger.error(text, self._failures)
            return None
        self._failures = 0
        return step

    def forward(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, batch: Any, save_kv_cache: bool
    ) -> Tensor | None:
        """A layer of the planned step, the other requests by the second parent.

        Args:
            q: `[rows, Hq * D]`, or with the heads apart; k, v: `[rows, Hkv, D]`, or None where the pool has them.
            layer: SGLang's `RadixAttention`.
            batch: the step.
            save_kv_cache: whether k and v have to be written to the pool.

        Returns:
            `[rows, Hq * D]`; None where the parent has to serve the whole step: nothing in it runs sparse, the layer is
            dense, or sparse attention failed.
        """
        step, state = self.step, self.layers.get(layer)
        if step is None or state is None or not state.runs_sparse or q.dtype != self._dtype:
            return None
        if save_kv_cache and k is not None and v is not None:
            where = KVWriteLoc.for_layer(batch, layer)
            self._pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
        query = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)

        def attend_one(index: int) -> tuple[Tensor, BlockSelection]:
            chunk = step.chunks[index]
            keys, values = self._pool.get_key_buffer(layer.layer_id), self._pool.get_value_buffer(layer.layer_id)
            rows = query[chunk.start : chunk.end].contiguous()  # parts of wider rows; kernels compile for strides
            return attend_paged(
                rows, keys[:, None], values[:, None], step.slots[index], chunk.kv_len, self._settings, layer.scaling,
                self._buffer(layer), state.attend,
            )  # fmt: skip

        if not state.attend_chunks(step.chunks, attend_one, output, self._names[layer], log.logger):
            return None
        if step.rest is not None:
            rows: Any = step.rows
            part = self._rest.forward_extend(take(q, rows), take(k, rows), take(v, rows), layer, step.rest, False)
            part = part.view(-1, *output.shape[1:])
            if isinstance(rows, slice):
                output[rows] = part
            else:
                output.index_copy_(0, rows, part)
        output[step.num_rows :].zero_()  # padding
        return output.view(len(output), -1)

    def _buffer(self, layer: Any) -> GatherBuffer:
        return self._buffers.setdefault((layer.tp_k_head_num, layer.head_dim), GatherBuffer())
