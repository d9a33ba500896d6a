"""Other implementations beside this one, on the same inputs: checked, then timed."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.attention import LengthBenchmark, Plan
from bench.check import Reference, no_better_than_zeros, relative_error
from bench.peers import SELECTORS, Call, Peer, density_of_ratio, foreign_code, identity, load, loaded_version
from flexprefill_fa import sparse_prefill_attention
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row

OURS = "flexprefill_fa"


class PeerBenchmark(LengthBenchmark):
    """All rows of one length: dense kernels and this package's selectors, then each peer of the same method.

    This package's rows are those of `LengthBenchmark`, checked against fp64 attention over the kept blocks. A peer's
    blocks are not known, so its output is held against dense attention (`dense_error`, which this package's sparse
    rows have too), and must be better than zeros. It gets the same values in its own layout `[B, L, H, D]`, copied
    before the clock starts. A peer may leave threads, default dtypes or torch itself changed: take `peer_rows` when
    `rows` of every length are through.

    Args:
        plan, length, note: as for `LengthBenchmark`.
    """

    def __init__(self, plan: Plan, length: int, note: Callable[[str], None]) -> None:
        super().__init__(plan, length, note)
        self.conditions["kind"] = "peers"

    def rows(self) -> Iterator[Row]:
        """The rows of dense attention and of this package; one whose call or check failed has `error` and no times."""
        for row in super().rows():
            yield row if row["selector"] is None else {**row, "implementation": OURS}

    def peer_rows(self, folder: Path, peers: list[Peer]) -> Iterator[Row]:
        """The rows of the peers found in a folder, after `rows`; one that failed has `error` and no times."""
        with torch.no_grad(), self._on_device():
            for peer in peers:
                for config in self.plan.configs:
                    if config.name == SELECTORS[peer.function]:
                        yield self._peer(peer, config, folder)

    def _selector(self, config: Any, dense: Reference) -> Iterator[Row]:
        for row in super()._selector(config, dense):
            if row["path"] == "sparse" and "error" not in row:
                out = sparse_prefill_attention(*self._tensors, config, dense="never", backend=row["backend"])
                row["dense_error"] = relative_error(out[:, :, dense.positions], dense.dense)
            yield row

    def _peer(self, peer: Peer, config: Any, folder: Path) -> Row:
        row: Row = {**self.conditions, "path": "peer", "selector": config.name, "settings": dataclasses.asdict(config)}
        row |= {"backend": None, "kernel": None, **identity(peer, folder)}
        try:
            with foreign_code(peer):
                function = load(peer)
                row["peer_version"] = loaded_version(peer)
                call = Call(peer, function, self.inputs, config)
                row["peer_settings"] = call.settings
                out, ratio = call.checked()
                expected = self.references[config]
                row["dense_error"] = relative_error(out[:, :, expected.positions], expected.dense)
                if problem := no_better_than_zeros(out, expected):
                    return {**row, "error": problem}
                del out
                found: Row = {}
                if ratio is not None:
                    found["density"] = density_of_ratio(ratio, self.length, config.block_size)
                    found["computational_ratio"] = round(ratio, 5)
                found |= self._peak(call)
                times = {"total_ms": self.watch.graph(call), **self._eager(call)}
            return row | found | self._timed(**times) | self._speedups(times["total_ms"])
        except (Exception, SystemExit) as error:  # somebody else's code may raise anything
            self.note(traceback.format_exc())
            return {**row, "error": f"{type(error).__name__}: {first_line(error)}"}
