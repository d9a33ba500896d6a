"""One attention layer of an engine that can run sparse: what it counts, and what happens when it fails.

Imports no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flexprefill_fa.selection import BlockSelection

from .engine_counts import DensityCounter, tally
from .engine_paged import AttendChunk, attend_chunk
from .engine_plan import Chunk

FAILURES_IN_A_ROW = 3
"""Steps after which sparse attention that keeps failing is switched off."""


class SparseLayer:
    """A layer whose long chunks run sparse until they fail too often.

    Attributes:
        sparse_counter: what its sparse chunks kept; None for a layer that the parent serves alone.
        sparse_off: whether its sparse attention failed so often that the parent serves it from then on.
        attend: what runs for a chunk, `attend_chunk`; benchmarks put something else here.
    """

    sparse_counter: DensityCounter | None = None
    sparse_off: bool = False
    attend: AttendChunk = staticmethod(attend_chunk)
    _failures: int = 0  # steps in a row

    @property
    def runs_sparse(self) -> bool:
        return self.sparse_counter is not None and not self.sparse_off

    def statistics(self) -> dict[str, Any]:
        """What its counter read, and `off`; waits for the GPU."""
        counter = self.sparse_counter
        return {} if counter is None else {**counter.read(), "off": self.sparse_off}

    def attend_chunks(
        self,
        chunks: Sequence[Chunk],
        attend_one: Callable[[int], tuple[Tensor, BlockSelection]],
        output: Tensor,
        name: str,
        logger: logging.Logger,
    ) -> bool:
        """The sparse chunks of a step; False where the parent has to serve it: the layer is dense, or this failed.

        An exception here would end the engine with every request in it; so it is logged and counted instead.

        Args:
            chunks: of the step.
            attend_one: `[q_len, Hq, D]` and what was kept, for the chunk of an index.
            output: `[rows, Hq, D]` of the step, filled where the chunks are.
            name: of the layer.
            logger: for what failed.
        """
        counter = self.sparse_counter
        if counter is None or self.sparse_off:
            return False
        try:
            tallies = []
            for index, chunk in enumerate(chunks):
                out, selection = attend_one(index)
                output[chunk.start : chunk.end].copy_(out)
                tallies.append(tally(selection))
            for counted in tallies:  # after the whole step: a chunk is either sparse or a failure
                counter.add(counted)
        except Exception:
            counter.failures += len(chunks)
            self._failures += 1
            logger.exception(
                "sparse prefill failed for chunks of (queries, keys) %s; the parent backend serves them",
                [(chunk.q_len, chunk.kv_len) for chunk in chunks],
            )
            if self._failures >= FAILURES_IN_A_ROW:
                self.sparse_off = True
                logger.error(
                    "sparse prefill of %s is off until the engine ends: %d steps failed in a row", name, self._failures
                )
            return False
        self._failures = 0
        return True
