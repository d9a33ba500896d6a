"""Other implementations beside this one, on the same inputs: checked, then timed."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.attention import LengthBenchmark
from bench.check import Reference, no_better_than_zeros, relative_error
from bench.peers import Peer, foreign_code
from bench.planning import Plan
from bench.speed_tables import OURS
from flexprefill_fa import sparse_prefill_attention
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row


class PeerBenchmark(LengthBenchmark):
    """All rows of one length: dense kernels and this package's selectors, then each peer of the same method.

    This package's rows are those of `LengthBenchmark`, checked against fp64 attention over the kept blocks. A peer's
    blocks are not known, so its output is held against dense attention (`dense_error`, which this package's sparse
    rows have too), and must be better than zeros. It gets the same values in its own layout, copied before the clock
    starts. A peer may leave threads, default dtypes or torch itself changed: take `peer_rows` when `rows` of every
    length are through.

    Args:
        plan, length, note: as for `LengthBenchmark`.
    """

    def __init__(self, plan: Plan, length: int, note: Callable[[str], None]) -> None:
        super().__init__(plan, length, note)
        self.conditions["kind"] = "peers"

    def selector_rows(self, config: Any, dense: Reference) -> Iterator[Row]:
        """As before, with `dense_error`."""
        for row in super().selector_rows(config, dense):
            row["implementation"] = OURS
            if row["path"] == "sparse" and "error" not in row:
                out = sparse_prefill_attention(*self.tensors, config, dense="never", backend=row["backend"])
                row["dense_error"] = relative_error(out[:, :, dense.positions], dense.dense)
            yield row

    def peer_rows(self, folder: Path, peers: list[Peer]) -> Iterator[Row]:
        """The rows of the peers in a folder, after `rows`; one that failed has `error` and no times."""
        with torch.no_grad(), self.on_device():
            for peer in peers:
                for config in self.plan.configs:
                    if config.name == peer.selector:
                        yield self._peer(peer, config, folder)

    def _peer(self, peer: Peer, config: Any, folder: Path) -> Row:
        row: Row = {**self.conditions, "path": "peer", "selector": config.name, "settings": dataclasses.asdict(config)}
        row |= {"backend": None, "kernel": None, **peer.identity(folder), "peer_version": None}
        try:
            with foreign_code(folder):
                call = peer.call(folder, self.inputs, config)
                row |= {"peer_version": peer.version, "peer_settings": call.settings}
                out, ratio = call.check()
                out = self._in_our_layout(out)
                expected = self.references[config]
                row["dense_error"] = relative_error(out[:, :, expected.positions], expected.dense)
                if problem := no_better_than_zeros(out, expected):
                    return {**row, "error": problem}
                del out
                found: Row = {}
                if ratio is not None:
                    short = self.length <= config.dense_tokens  # the released function says 1 where it is dense
                    found["density"] = 1.0 if short else density_of_ratio(ratio, self.length, config.block_size)
                    found["computational_ratio"] = round(ratio, 5)
                found |= self.times({"total_ms": call.run})
            return row | found | self.speedups(found)
        except (Exception, SystemExit) as error:  # somebody else's code may raise anything
            self.note(traceback.format_exc())
            return {**row, "error": f"{type(error).__name__}: {first_line(error)}"}

    def _in_our_layout(self, out: Any) -> Tensor:
        """A peer's output as `[B, H, L, D]`.

        Raises:
            ValueError: for one of another shape, or that is not finite.
        """
        expected = list(self.inputs.query.transpose(1, 2).shape)
        if not isinstance(out, Tensor) or list(out.shape) != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"its output must have shape [B, L, H, D] = {expected}, got {got}")
        if not bool(out.isfinite().all()):
            raise ValueError("its output is not finite")
        return out.transpose(1, 2)


def density_of_ratio(ratio: float, tokens: int, block_size: int) -> float:
    """Kept blocks / causal blocks from kept blocks / all blocks, of as many queries as keys, to five digits.

    Raises:
        ValueError: for a density that cannot be.
    """
    blocks = -(-tokens // block_size)
    density = round(ratio * 2 * blocks / (blocks + 1), 5)
    if not 0 < density <= 1:
        raise ValueError(f"its ratio {ratio:g} means a density of {density:g}, which must be in (0, 1]")
    return density
